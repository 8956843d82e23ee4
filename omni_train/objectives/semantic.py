"""What codebook 0 learns to mean: a teacher's features of the same speech, brought to the frames of the codes.

Axis letters: B crops, T frames of the teacher, K frames of codes, D width of the teacher's features.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

TEACHER_SAMPLING_RATE = 16000
"""Hz, of what every teacher hears."""


class Teacher(Protocol):
    """Whoever knows what is said.

    Attributes:
        rate: features a second.
        size: their width D.
    """

    rate: float
    size: int

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What has its weights."""
        ...

    def __call__(self, waveforms: list[torch.Tensor]) -> torch.Tensor:
        """Features (B, T, D) of waveforms (n,) of 16 kHz, without gradient; zeros, or anything, after a clip's end."""
        ...


def to_frames(features_BTD: torch.Tensor, rate: float, frames: int, frame_rate: float) -> torch.Tensor:
    """Features (B, K, D) of ``frames`` frames of codes.

    A teacher that is faster than the codes is averaged over each frame of theirs (Mimi's average pooling); a slower one
    is interpolated between the middles of its own.
    """
    steps = features_BTD.shape[1]
    if rate >= frame_rate:
        edges = torch.arange(frames + 1) * rate / frame_rate  # in frames of the teacher
        begin, end = edges[:-1, None], edges[1:, None]
        step = torch.arange(steps)
        weights_KT = (torch.minimum(end, step + 1) - torch.maximum(begin, step)).clamp_min(0)
        beyond = weights_KT.sum(1) == 0  # convolutions without padding end some frames early
        weights_KT[beyond, -1] = 1
    else:
        middles = ((torch.arange(frames) + 0.5) * rate / frame_rate - 0.5).clamp(0, steps - 1)
        weights_KT = (1 - (middles[:, None] - torch.arange(steps)).abs()).clamp_min(0)
    weights_KT = (weights_KT / weights_KT.sum(1, keepdim=True)).to(features_BTD)
    return weights_KT @ features_BTD


def cosine_distance(student_BKD: torch.Tensor, teacher_BKD: torch.Tensor, heard_BK: torch.Tensor) -> torch.Tensor:
    """1 minus the cosine of the angle between the two, mean (B,) over the frames where ``heard_BK`` is True."""
    distance_BK = 1 - F.cosine_similarity(student_BKD.float(), teacher_BKD.float(), dim=2)
    return (distance_BK * heard_BK).sum(1) / heard_BK.sum(1)
