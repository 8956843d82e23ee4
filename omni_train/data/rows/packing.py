"""Packing of sequences into rows: which sequences share a row, and the row that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.rows.sequences import TokenSequence
from omni_train.recipe.schema import DataConfig, Positions


def aligned(length: int, alignment: int) -> int:
    """Length rounded up to a multiple of ``alignment``."""
    return -(-length // alignment) * alignment


def best_fit(lengths: Sequence[Sequence[int]], bounds: Sequence[int]) -> list[int]:
    """Choose one row's pieces from a buffer, as indices into ``lengths``, each bounded length of which is kept.

    The oldest (index 0) comes first, so that none waits for ever; then always the longest that still fits, the older of
    two equals. Of several lengths the sum counts, each as a share of its bound. All are aligned and within the bounds.
    """

    def share(index: int) -> int:
        """Sum of the shares of a piece times all bounds: exact."""
        return sum(length * (prod(bounds) // bound) for length, bound in zip(lengths[index], bounds, strict=True))

    chosen, room = [0], [bound - length for bound, length in zip(bounds, lengths[0], strict=True)]
    for index in sorted(range(1, len(lengths)), key=share, reverse=True):  # stable, so equals keep their order
        left = [free - length for free, length in zip(room, lengths[index], strict=True)]
        if min(left) >= 0:
            chosen.append(index)
            room = left
    return chosen


def packer(data: DataConfig, padding_token: int) -> Callable[[Sequence[TokenSequence]], PackedBatch]:
    """Function that packs sequences into a row as a recipe's data say, for training and for evaluation alike."""
    return functools.partial(
        pack,
        row_tokens=data.row_tokens,
        alignment=data.alignment,
        padding_token=padding_token,
        float_positions=data.media.positions is Positions.qwen3_omni,
    )


def pack(
    sequences: Sequence[TokenSequence],
    *,
    row_tokens: int,
    alignment: int,
    padding_token: int,
    float_positions: bool = False,
) -> PackedBatch:
    """Row of T = ``row_tokens`` tokens, a multiple of ``alignment``, whose aligned sequences sum to at most T.

    Media lie in the row in the order of their sequences, and slots count from the row's first token. Rotary ids are
    int64, or float32 where ``float_positions`` or those of a sequence are; those of padding mean nothing.
    """
    tokens_T = np.full(row_tokens, padding_token, dtype=np.int64)
    labels_T = np.full(row_tokens, IGNORE, dtype=np.int64)
    padding_T = np.ones(row_tokens, dtype=bool)
    modality_T = np.zeros(row_tokens, dtype=np.uint8)
    boundaries = row_boundaries([len(sequence) for sequence in sequences], row_tokens, alignment)
    for start, sequence in zip(boundaries, sequences, strict=False):
        stop = start + len(sequence)
        tokens_T[start:stop] = sequence.tokens
        labels_T[start:stop] = sequence.labels
        padding_T[start:stop] = False
        modality_T[start:stop] = sequence.modality
    return PackedBatch(
        tokens=torch.from_numpy(tokens_T),
        labels=torch.from_numpy(labels_T),
        loss_weights=torch.from_numpy((labels_T != IGNORE).astype(np.float32)),
        position_ids=torch.from_numpy(row_positions([one.positions for one in sequences], boundaries, float_positions)),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        padding=torch.from_numpy(padding_T),
        samples=sum(sequence.begins_sample for sequence in sequences),
        modality=torch.from_numpy(modality_T),
        **_media(sequences, boundaries[: len(sequences)]),
    )


def row_boundaries(lengths: Sequence[int], row_tokens: int, alignment: int) -> list[int]:
    """Boundaries of a row's sequences, each aligned, the last perhaps of padding: from 0 to ``row_tokens``."""
    boundaries = [0]
    for length in lengths:
        boundaries.append(boundaries[-1] + aligned(length, alignment))
    if boundaries[-1] < row_tokens:
        boundaries.append(row_tokens)
    return boundaries


def row_positions(own: Sequence[np.ndarray | None], boundaries: list[int], floats: bool) -> np.ndarray:
    """Rotary ids (3, T) of the row of sequences between ``boundaries``, which have their own or count from 0."""
    positions_T = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in np.diff(boundaries))])
    positions_3T = np.stack([positions_T] * 3)
    if floats or any(ids is not None and ids.dtype.kind == "f" for ids in own):
        positions_3T = positions_3T.astype(np.float32)
    for start, ids in zip(boundaries, own, strict=False):
        if ids is not None:
            positions_3T[:, start : start + ids.shape[1]] = ids
    return positions_3T


def _media(sequences: Sequence[TokenSequence], starts: list[int]) -> dict[str, Any]:
    """Media fields of a row whose sequences begin at ``starts``, without kinds of media that it does not hold."""
    fields: dict[str, Any] = {}
    if clips := [clip_FM for sequence in sequences for clip_FM in sequence.mel]:
        fields["mel"] = torch.from_numpy(np.concatenate(clips))
        fields["mel_cu_seqlens"] = torch.tensor([0, *np.cumsum([len(clip) for clip in clips])], dtype=torch.int32)
        fields["audio_slots"] = _in_the_row([sequence.audio_slots for sequence in sequences], starts)
    if patches := [patches_PD for sequence in sequences for patches_PD in sequence.patches]:
        fields["patches"] = torch.from_numpy(np.concatenate(patches))
        fields["grid_thw"] = torch.tensor([grid for sequence in sequences for grid in sequence.grids])
        fields["vision_slots"] = _in_the_row([sequence.vision_slots for sequence in sequences], starts)
    return fields


def _in_the_row(slots: list[np.ndarray], starts: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([own + start for own, start in zip(slots, starts, strict=True)]))
