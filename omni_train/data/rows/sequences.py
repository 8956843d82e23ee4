"""Token sequences with labels and media, which rows of tokens are packed from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from omni_train.data.rows.batch import IGNORE


@dataclass
class TokenSequence:
    """Token sequence, which packing never splits: a sample, or one piece of a document longer than a row."""

    tokens: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32, shifted: labels[i] is the token that position i predicts, or IGNORE
    begins_sample: bool = True
    positions: np.ndarray | None = None  # (3, n) int64 or float32 rotary ids; None counts from 0 on all three axes
    modality: int = 0  # index into batch.MODALITIES
    mel: list[np.ndarray] = field(default_factory=list)  # (F, M) float32 of each clip
    audio_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # within the sequence
    patches: list[np.ndarray] = field(default_factory=list)  # (P, D) uint8 of each image or video
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # (t, h, w) patches of each image or video
    vision_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def media_bytes(self) -> int:
        """Memory of the decoded media, in bytes."""
        return sum(array.nbytes for array in (*self.mel, *self.patches))


def shifted(tokens: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Labels of tokens, shifted by one: the next token where that is learned, else ``IGNORE``."""
    labels = np.full_like(tokens, IGNORE)
    labels[:-1] = np.where(learned[1:], tokens[1:], IGNORE)
    return labels
