"""The packed batch: the one type in which data code and model code meet.

Axis letters: T tokens of the row, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

IGNORE = -100
"""Label of a position that carries no loss."""


@dataclass
class PackedBatch:
    """One row of T tokens holding N whole sequences, one after the other.

    Each sequence is padded at its end to a multiple of the recipe's ``data.alignment``; what is left of the row is one
    last sequence of padding. Labels are shifted here and nowhere else: ``labels[t]`` is the token that position t
    predicts. A sequence is a whole sample, or one piece of a document longer than T.
    """

    tokens: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, IGNORE where there is no loss
    loss_weights: torch.Tensor  # (T,) float32, 0 where there is no loss
    position_ids: torch.Tensor  # (3, T) int64: T, H, W rotary ids, from 0 in each sequence
    cu_seqlens: torch.Tensor  # (N+1,) int32, from 0 to T
    padding: torch.Tensor  # (T,) bool, True where the token is padding
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> samples refused since the stream's last row
    samples: int = 0  # samples that begin in this row

    TENSORS = ("tokens", "labels", "loss_weights", "position_ids", "cu_seqlens", "padding")

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, padding included."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @property
    def num_loss_tokens(self) -> float:
        """Sum of the loss weights."""
        return float(self.loss_weights.sum())
