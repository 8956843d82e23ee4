"""What a speech model teaches the codec: codebook 0 its features at the frames of the codes (Mimi), and the decoder to
make sounds in which it hears what it hears in the recording.

Axis letters: B crops, T frames of the teacher, K frames of codes, D width of the teacher's features.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

TEACHER_SAMPLING_RATE = 16000
"""Sampling rate of the waveforms that every teacher takes, in Hz."""


class Teacher(Protocol):
    """Frozen model whose features of speech codebook 0 learns.

    Attributes:
        rate: features a second.
        size: width D of the features.
    """

    rate: float
    size: int

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules that hold the teacher's weights."""
        ...

    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        """Features (B, T, D) of waveforms (n,) at 16 kHz, which the waveforms have a gradient of; undefined behind the
        end of a waveform."""
        ...


def to_frames(features_BTD: torch.Tensor, rate: float, frames: int, frame_rate: float) -> torch.Tensor:
    """Features (B, K, D) of a teacher, brought to the frames of the codes.

    Where the teacher has more frames than the codes, its features are averaged over each frame of codes (as Mimi's
    average pooling does); where it has fewer, they are interpolated between the middles of its frames.

    Args:
        features_BTD: the teacher's features.
        rate: of them, in Hz.
        frames: K, how many frames of codes.
        frame_rate: of the codes, in Hz.
    """
    steps = features_BTD.shape[1]
    if rate >= frame_rate:
        edges = torch.arange(frames + 1) * rate / frame_rate  # in frames of the teacher
        begin, end = edges[:-1, None], edges[1:, None]
        step = torch.arange(steps)
        weights_KT = (torch.minimum(end, step + 1) - torch.maximum(begin, step)).clamp_min(0)
        beyond = weights_KT.sum(1) == 0  # a teacher's convolutions without padding end some frames early
        weights_KT[beyond, -1] = 1
    else:
        middles = ((torch.arange(frames) + 0.5) * rate / frame_rate - 0.5).clamp(0, steps - 1)
        weights_KT = (1 - (middles[:, None] - torch.arange(steps)).abs()).clamp_min(0)
    weights_KT = (weights_KT / weights_KT.sum(1, keepdim=True)).to(features_BTD)
    return weights_KT @ features_BTD


def cosine_distance(student_BKD: torch.Tensor, teacher_BKD: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
    """Cosine distance of two features, mean (B,) over the frames where ``mask_BK`` is True."""
    distance_BK = 1 - F.cosine_similarity(student_BKD.float(), teacher_BKD.float(), dim=2)
    return (distance_BK * mask_BK).sum(1) / mask_BK.sum(1)
