"""Packing: which sequences share a row, and the row they make."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from omni_train.data.batch import IGNORE, PackedBatch
from omni_train.data.chat import TokenSequence


def aligned(length: int, alignment: int) -> int:
    """``length`` rounded up to a multiple of ``alignment``."""
    return -(-length // alignment) * alignment


def best_fit(lengths: Sequence[int], row_tokens: int) -> list[int]:
    """Choose one row's sequences from a buffer, as indices into ``lengths``.

    The oldest (index 0) comes first, so that none waits for ever; then always the longest that still fits, the older of
    two equals. ``lengths`` are aligned and at most ``row_tokens``.
    """
    chosen, room = [0], row_tokens - lengths[0]
    waiting = sorted((length, -index) for index, length in enumerate(lengths) if index > 0)
    while (fits := bisect.bisect_right(waiting, (room, 0))) > 0:
        length, index = waiting.pop(fits - 1)
        chosen.append(-index)
        room -= length
    return chosen


def pack(sequences: Sequence[TokenSequence], *, row_tokens: int, alignment: int, padding_token: int) -> PackedBatch:
    """One row of T = ``row_tokens``, a multiple of ``alignment``; the aligned lengths sum to at most T."""
    tokens_T = np.full(row_tokens, padding_token, dtype=np.int64)
    labels_T = np.full(row_tokens, IGNORE, dtype=np.int64)
    padding_T = np.ones(row_tokens, dtype=bool)
    boundaries = [0]
    for sequence in sequences:
        start = boundaries[-1]
        stop = start + len(sequence)
        tokens_T[start:stop] = sequence.tokens
        labels_T[start:stop] = sequence.labels
        padding_T[start:stop] = False
        boundaries.append(start + aligned(len(sequence), alignment))
    if boundaries[-1] < row_tokens:
        boundaries.append(row_tokens)
    positions_T = np.concatenate([np.arange(length) for length in np.diff(boundaries)])
    return PackedBatch(
        tokens=torch.from_numpy(tokens_T),
        labels=torch.from_numpy(labels_T),
        loss_weights=torch.from_numpy((labels_T != IGNORE).astype(np.float32)),
        position_ids=torch.from_numpy(np.stack([positions_T] * 3)),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        padding=torch.from_numpy(padding_T),
        samples=sum(sequence.begins_sample for sequence in sequences),
    )
