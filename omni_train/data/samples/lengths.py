"""Lengths of media in tokens: the encoders' arithmetic, which data and models must agree on."""

from __future__ import annotations

from math import prod

from omni_train.recipe.schema import AudioEncoderConfig, CodecConfig, ModelConfig, VisionEncoderConfig

FRAMES_PER_SECOND = 100  # mel frames: a hop of 10 ms


def convolved(frames: int, convolutions: int) -> int:
    """Length after convolutions of stride 2, kernel 3 and padding 1."""
    for _ in range(convolutions):
        frames = (frames + 1) // 2
    return frames


def audio_tokens(frames: int, audio: AudioEncoderConfig) -> int:
    """Audio tokens of a clip of mel frames, of which each chunk is convolved by itself."""
    whole, rest = divmod(frames, audio.chunk_frames)
    convolutions = audio.num_convolutions
    return whole * convolved(audio.chunk_frames, convolutions) + convolved(rest, convolutions)


def window_tokens(window_frames: int, audio: AudioEncoderConfig) -> int:
    """Attention window in audio tokens, at least one; 0 for the whole clip."""
    per_chunk = convolved(audio.chunk_frames, audio.num_convolutions)
    return max(1, round(window_frames * per_chunk / audio.chunk_frames)) if window_frames else 0


def vision_tokens(grid: tuple[int, int, int], vision: VisionEncoderConfig) -> int:
    """Vision tokens of an image or video of a grid of (t, h, w) patches."""
    t, h, w = grid
    return t * (h // vision.spatial_merge_size) * (w // vision.spatial_merge_size)


def audio_tokens_per_second(audio: AudioEncoderConfig) -> float:
    """Rate of audio tokens in Hz: 6.25 in Qwen3.5-Omni, 13 in Qwen3-Omni."""
    return convolved(audio.chunk_frames, audio.num_convolutions) * FRAMES_PER_SECOND / audio.chunk_frames


def most_seconds(tokens: int, audio: AudioEncoderConfig) -> float:
    """Length in seconds above which sound becomes more than ``tokens`` audio tokens."""
    chunks = max(tokens, 0) // convolved(audio.chunk_frames, audio.num_convolutions) + 1
    return chunks * audio.chunk_frames / FRAMES_PER_SECOND


def audio_token_start(index: int, audio: AudioEncoderConfig) -> float:
    """Time in seconds at which audio token ``index`` of a clip begins."""
    chunk, within = divmod(index, convolved(audio.chunk_frames, audio.num_convolutions))
    return (chunk * audio.chunk_frames + within * 2**audio.num_convolutions) / FRAMES_PER_SECOND


def codec_sampling_rate(model: ModelConfig) -> int:
    """Sampling rate in Hz of the waveforms that the codec encodes and Code2Wav synthesizes."""
    return (model.codec or CodecConfig()).sampling_rate


def codec_frame_samples(model: ModelConfig) -> int:
    """Samples of one codec frame, as many as Code2Wav synthesizes from it: 1,920 at 24 kHz and 12.5 frames a second."""
    return prod([*model.code2wav.upsampling_ratios, *model.code2wav.upsample_rates])


def crop_frames(seconds: float, model: ModelConfig) -> int:
    """Codec frames of a crop of ``seconds``, at least one."""
    return max(1, round(seconds * codec_sampling_rate(model) / codec_frame_samples(model)))
