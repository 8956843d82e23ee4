"""Packing of sequences into rows: which sequences share a row, and the row that they make."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.rows.sequences import TokenSequence
from omni_train.recipe.schema import DataConfig, Positions


def aligned(length: int, alignment: int) -> int:
    """Length rounded up to a multiple of ``alignment``."""
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
    boundaries = [0]
    for sequence in sequences:
        start = boundaries[-1]
        stop = start + len(sequence)
        tokens_T[start:stop] = sequence.tokens
        labels_T[start:stop] = sequence.labels
        padding_T[start:stop] = False
        modality_T[start:stop] = sequence.modality
        boundaries.append(start + aligned(len(sequence), alignment))
    starts = boundaries[: len(sequences)]
    if boundaries[-1] < row_tokens:
        boundaries.append(row_tokens)
    return PackedBatch(
        tokens=torch.from_numpy(tokens_T),
        labels=torch.from_numpy(labels_T),
        loss_weights=torch.from_numpy((labels_T != IGNORE).astype(np.float32)),
        position_ids=torch.from_numpy(_positions(sequences, boundaries, float_positions)),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        padding=torch.from_numpy(padding_T),
        samples=sum(sequence.begins_sample for sequence in sequences),
        modality=torch.from_numpy(modality_T),
        **_media(sequences, starts),
    )


def _positions(sequences: Sequence[TokenSequence], boundaries: list[int], floats: bool) -> np.ndarray:
    """Rotary ids (3, T) of the row of sequences between ``boundaries``."""
    positions_T = np.concatenate([np.arange(length) for length in np.diff(boundaries)])
    positions_3T = np.stack([positions_T] * 3)
    own = [sequence.positions for sequence in sequences]
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
