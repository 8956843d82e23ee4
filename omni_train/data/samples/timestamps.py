"""Timestamps as text: before every temporal patch of a video, and at random intervals inside a sound.

Qwen3.5-Omni's report states both and publishes no format. The words are those of the released Qwen3-VL; the
distribution of the intervals is ours: uniform between two bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from omni_train.data.samples.lengths import audio_token_start, audio_tokens_per_second
from omni_train.data.samples.sample import Medium
from omni_train.recipe.schema import AudioEncoderConfig


def timestamp(seconds: float) -> str:
    """Text of a time, as ``<1.2 seconds>``: that of the processor of Qwen3-VL and Qwen3.5."""
    return f"<{seconds:.1f} seconds>"


def inside_sound(
    tokens: int, audio: AudioEncoderConfig, bounds: Sequence[float], medium: Medium, data: bytes
) -> list[tuple[int, str]]:
    """Timestamps inside a sound of ``tokens`` audio tokens: (index of the token that follows, text), by index.

    ``bounds`` are the shortest and longest interval in seconds; without them there are no timestamps. The draw depends
    on the file and its cut alone, so that every epoch, rank and worker writes the same.
    """
    if not bounds or max(1, round(bounds[0] * audio_tokens_per_second(audio))) >= tokens:
        return []
    digest = hashlib.blake2b(data, digest_size=8, key=f"{medium.start} {medium.end}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest))
    stamps = []
    index = 0
    while True:
        index += max(1, round(generator.uniform(*bounds) * audio_tokens_per_second(audio)))
        if index >= tokens:
            return stamps
        stamps.append((index, timestamp(audio_token_start(index, audio))))
