"""Reading of a sample's media, and their layout among the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from omni_train.data.samples.features.mel import log_mel
from omni_train.data.samples.kinds import medium_kinds
from omni_train.data.samples.layout import Item, lay_out_audio, lay_out_block, lay_out_image, lay_out_video
from omni_train.data.samples.lengths import audio_tokens, audio_tokens_per_second, most_seconds, vision_tokens
from omni_train.data.samples.media import read_audio, read_image, read_video
from omni_train.data.samples.positions import Block
from omni_train.data.samples.sample import Medium, SampleError
from omni_train.data.samples.timestamps import inside_sound
from omni_train.recipe.schema import AudioEncoderConfig, MediaConfig, ModelConfig, Positions

TOKENS_PER_SECOND = 6.25  # the grid of time for a model without an audio encoder


@dataclass
class Clip:
    """Clip: the features of a medium, and the items that stand for it among the tokens."""

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
    """Clip of one medium, read as its kind does: see ``MediumKind.read``.

    Raises SampleError: ``no_vision_encoder``, ``no_audio_encoder``, ``media_missing`` (the sample names a file that it
    lacks), ``too_long`` for sound of more than ``sound_tokens``, and the reasons of ``omni_train.data.samples.media``.
    """
    kind = medium_kinds()[medium.kind]
    for encoder in kind.encoders(medium):
        if getattr(model, encoder) is None:
            raise SampleError(f"no_{encoder}_encoder")
    data = parts.get(medium.file)
    if data is None:
        raise SampleError("media_missing")
    return kind.read(medium, data, model, media, max_tokens=max_tokens, sound_tokens=sound_tokens)


def read_sound(
    medium: Medium, data: bytes, model: ModelConfig, media: MediaConfig, sound_tokens: int | None = None
) -> Clip:
    """Clip of a sound, or of the part of it that the sample names."""
    waveform = read_audio(data, media, medium.start, medium.end, most=_most(sound_tokens, model))
    mel_FM, tokens = _features(waveform, model.audio)
    bounds = media.audio_timestamp_seconds if media.positions != Positions.qwen3_omni else ()
    items = lay_out_audio(tokens, inside_sound(tokens, model.audio, bounds, medium, data))
    return Clip("audio", items, audio_tokens=tokens, mel=mel_FM)


def read_picture(data: bytes, model: ModelConfig, media: MediaConfig) -> Clip:
    """Clip of an image."""
    merge = model.vision.spatial_merge_size
    patches_PD, grid = read_image(data, media, model.vision)
    items = lay_out_image(grid[1] // merge, grid[2] // merge)
    return Clip("image", items, vision_tokens=vision_tokens(grid, model.vision), patches=patches_PD, grid=grid)


def read_film(
    medium: Medium,
    data: bytes,
    model: ModelConfig,
    media: MediaConfig,
    max_tokens: int | None = None,
    sound_tokens: int | None = None,
) -> Clip:
    """Clip of a video, of at most ``max_tokens`` vision tokens beside those of its sound and timestamps."""
    merge = model.vision.spatial_merge_size
    video = read_video(
        data,
        media,
        model.vision,
        sound=medium.sound,
        start=medium.start,
        end=medium.end,
        max_tokens=max_tokens,
        most_sound=_most(sound_tokens, model),
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


def _most(sound_tokens: int | None, model: ModelConfig) -> float | None:
    """Seconds of sound beyond which none is decoded."""
    return None if sound_tokens is None or model.audio is None else most_seconds(sound_tokens, model.audio)


def _features(waveform: np.ndarray, audio: AudioEncoderConfig) -> tuple[np.ndarray, int]:
    """Log-mel frames (F, M) and the number of tokens that they become."""
    mel_FM = log_mel(waveform, audio.num_mel_bins)
    return mel_FM, audio_tokens(len(mel_FM), audio)
