"""Media of a sample: read, and laid out among the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from omni_train.data.samples.features.mel import log_mel
from omni_train.data.samples.lengths import audio_tokens, audio_tokens_per_second, most_seconds, vision_tokens
from omni_train.data.samples.media import read_audio, read_image, read_video
from omni_train.data.samples.positions import Audio, Block, Frame, Kind
from omni_train.data.samples.sample import Medium, SampleError
from omni_train.data.samples.timestamps import inside_sound, timestamp
from omni_train.recipe.schema import AudioEncoderConfig, MediaConfig, ModelConfig, Positions

AUDIO_START, AUDIO_END = "<|audio_start|>", "<|audio_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TOKENS_PER_SECOND = 6.25  # the grid of time for a model that sees and does not hear


@dataclass(frozen=True)
class Marks:
    """Control tokens around a medium, or one that has begun before them."""

    names: tuple[str, ...]
    continues: bool = False


@dataclass(frozen=True)
class Stamp:
    """A timestamp: text like that beside it."""

    text: str
    continues: bool = False


Item = Marks | Stamp | Audio | Frame | Block


@dataclass
class Clip:
    """A medium that was read: its features, and what stands for it among the tokens."""

    modality: str  # one of batch.MODALITIES
    items: list[Item]
    audio_tokens: int = 0
    vision_tokens: int = 0
    mel: np.ndarray | None = None  # (F, M) float32
    patches: np.ndarray | None = None  # (P, D) uint8
    grid: tuple[int, int, int] | None = None  # (t, h, w) patches


def read_clip(
    medium: Medium,
    *,
    parts: Mapping[str, bytes],
    model: ModelConfig,
    media: MediaConfig,
    max_tokens: int | None = None,
    sound_tokens: int | None = None,
) -> Clip:
    """Read one medium; a video of at most ``max_tokens`` vision tokens, beside those of its sound and timestamps.

    Sound that becomes more than ``sound_tokens`` is decoded no further. Raises SampleError: ``no_vision_encoder``,
    ``no_audio_encoder``, ``media_missing`` (the sample names a file that it lacks), ``too_long`` for such sound, and
    the reasons of ``omni_train.data.samples.media``.
    """
    if medium.kind != "audio" and model.vision is None:
        raise SampleError("no_vision_encoder")
    if (medium.kind == "audio" or medium.sound) and model.audio is None:
        raise SampleError("no_audio_encoder")
    data = parts.get(medium.file)
    if data is None:
        raise SampleError("media_missing")
    most = None if sound_tokens is None or model.audio is None else most_seconds(sound_tokens, model.audio)
    if medium.kind == "audio":
        mel_FM, tokens = _features(read_audio(data, media, medium.start, medium.end, most=most), model.audio)
        bounds = media.audio_timestamp_seconds if media.positions != Positions.qwen3_omni else ()
        items = lay_out_audio(tokens, inside_sound(tokens, model.audio, bounds, medium, data))
        return Clip("audio", items, audio_tokens=tokens, mel=mel_FM)
    merge = model.vision.spatial_merge_size
    if medium.kind == "image":
        patches_PD, grid = read_image(data, media, model.vision)
        items = lay_out_image(grid[1] // merge, grid[2] // merge)
        return Clip("image", items, vision_tokens=vision_tokens(grid, model.vision), patches=patches_PD, grid=grid)
    video = read_video(
        data,
        media,
        model.vision,
        sound=medium.sound,
        start=medium.start,
        end=medium.end,
        max_tokens=max_tokens,
        most_sound=most,
    )
    mel_FM, tokens = _features(video.waveform, model.audio) if video.waveform is not None else (None, 0)
    t, height, width = video.grid[0], video.grid[1] // merge, video.grid[2] // merge
    if media.positions == Positions.qwen3_omni:
        items = lay_out_block(Block(t, height, width, video.seconds_per_grid, tokens))
    else:
        rate = audio_tokens_per_second(model.audio) if model.audio else TOKENS_PER_SECOND
        items = lay_out_video(
            height, width, video.seconds, tokens, tokens_per_second=rate, timestamps=media.video_timestamps
        )
    return Clip(
        "video_audio" if tokens else "video",
        items,
        audio_tokens=tokens,
        vision_tokens=vision_tokens(video.grid, model.vision),
        mel=mel_FM,
        patches=video.patches,
        grid=video.grid,
    )


def _features(waveform: np.ndarray, audio: AudioEncoderConfig) -> tuple[np.ndarray, int]:
    """Log-mel frames (F, M) and the number of tokens that they become."""
    mel_FM = log_mel(waveform, audio.num_mel_bins)
    return mel_FM, audio_tokens(len(mel_FM), audio)


def lay_out_audio(tokens: int, stamps: list[tuple[int, str]]) -> list[Item]:
    """A sound of ``tokens``, with text before the tokens of the given indices."""
    items: list[Item] = [Marks((AUDIO_START,))]
    begin = 0
    for index, text in stamps:
        items += [Audio(index - begin, begin, continues=begin > 0), Stamp(text, continues=True)]
        begin = index
    return [*items, Audio(tokens - begin, begin, continues=begin > 0), Marks((AUDIO_END,), continues=True)]


def lay_out_image(height: int, width: int) -> list[Item]:
    """An image of ``height`` x ``width`` tokens."""
    return [Marks((VISION_START,)), Frame(Kind.image, height, width), Marks((VISION_END,))]


def lay_out_video(
    height: int, width: int, seconds: np.ndarray, sound: int, *, tokens_per_second: float, timestamps: bool
) -> list[Item]:
    """A video of temporal patches of ``height`` x ``width`` tokens at ``seconds`` (t,), with ``sound`` audio tokens.

    Everything stands in order of time on the grid of the audio tokens, a patch before the audio token of the same time,
    each patch and each stretch of sound between its own marks, and a timestamp before each patch.
    """
    items: list[Item] = []
    heard = 0

    def hear(until: int) -> None:
        nonlocal heard
        if until > heard:
            begun = bool(items)
            items.extend([Marks((AUDIO_START,), begun), Audio(until - heard, heard, begun), Marks((AUDIO_END,), True)])
            heard = until

    for second in seconds:
        step = int(second * tokens_per_second + 0.5)
        hear(min(step, sound))
        begun = bool(items)
        if timestamps:
            items.append(Stamp(timestamp(second), begun))
        items += [
            Marks((VISION_START,), begun),
            Frame(Kind.video, height, width, step, begun),
            Marks((VISION_END,), True),
        ]
    hear(sound)
    return items


def lay_out_block(block: Block) -> list[Item]:
    """A video of the released Qwen3-Omni: one span, its sound within."""
    if block.audio == 0:
        return [Marks((VISION_START,)), block, Marks((VISION_END,))]
    return [Marks((VISION_START, AUDIO_START)), block, Marks((AUDIO_END,)), Marks((VISION_END,))]
