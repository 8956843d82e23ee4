"""Packing of the Talker's sequences into a row, together with the Thinker's sequences whose states they read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from omni_train.data.rows.batch import PackedBatch, SpeechRow
from omni_train.data.rows.packing import pack, row_boundaries, row_positions
from omni_train.data.rows.speech import SpeechSequence
from omni_train.data.rows.speech_plans import NONE, TEXT, Plan
from omni_train.recipe.schema import DataConfig, Positions, States


def speech_packer(data: DataConfig, padding_token: int) -> Callable[[Sequence[SpeechSequence]], SpeechRow]:
    """Function that packs sequences of the Talker into a row as a recipe's data say."""
    return functools.partial(
        pack_speech,
        row_tokens=data.row_tokens if data.speech.states is States.live else 0,
        speech_row_tokens=data.speech.row_tokens,
        alignment=data.alignment,
        padding_token=padding_token,
        float_positions=data.media.positions is Positions.qwen3_omni,
    )


def pack_speech(
    sequences: Sequence[SpeechSequence],
    *,
    row_tokens: int,
    speech_row_tokens: int,
    alignment: int,
    padding_token: int,
    float_positions: bool = False,
) -> SpeechRow:
    """Row of U = ``speech_row_tokens`` positions and T = ``row_tokens`` tokens of the Thinker, of one sequence or more.

    The aligned sequences sum to at most U, those of the Thinker to at most T, which is 0 where there are none. Padding
    is as in :func:`pack`: nothing enters there, and nothing is predicted.
    """
    read = [sequence for sequence in sequences if sequence.thinker is not None]
    thinker = pack(
        [sequence.thinker for sequence in read if sequence.thinker is not None],
        row_tokens=row_tokens,
        alignment=alignment,
        padding_token=padding_token,
        float_positions=float_positions,
    )
    boundaries = row_boundaries([len(sequence) for sequence in sequences], speech_row_tokens, alignment)
    row = Plan.blank(speech_row_tokens, sequences[0].plan.codes.shape[1], TEXT)
    padding_U, draws_U = np.ones(speech_row_tokens, bool), np.zeros(speech_row_tokens, np.float32)
    known = 0  # states of the sequences before
    for start, sequence in zip(boundaries, sequences, strict=False):
        own, plan = slice(start, start + len(sequence)), sequence.plan
        for name in (spec.name for spec in fields(Plan)):
            getattr(row, name)[own] = getattr(plan, name)
        assert plan.sources.max(initial=NONE) < len(sequence.positions), "a position reads another sequence's state"
        row.sources[own] += np.where(plan.sources == NONE, 0, known)
        padding_U[own] = False
        draws_U[own] = sequence.draws
        known += len(sequence.positions)
    begins = thinker.cu_seqlens[: len(read)].tolist()
    context = [begin + sequence.positions for begin, sequence in zip(begins, read, strict=True)]
    stored = [sequence.states for sequence in sequences if sequence.states is not None]
    shared = {spec.name: getattr(thinker, spec.name) for spec in fields(PackedBatch)}
    others: dict[str, Any] = {"states": torch.from_numpy(np.concatenate(stored))} if stored else {}
    ids = row_positions([sequence.rotary_ids for sequence in sequences], boundaries, False)
    return SpeechRow(
        **shared | others | {"samples": len(sequences)},
        text_ids=torch.from_numpy(row.text_ids),
        sources=torch.from_numpy(row.sources),
        codes=torch.from_numpy(row.codes),
        speech_labels=torch.from_numpy(row.labels),
        label_codes=torch.from_numpy(row.label_codes),
        speech_positions=torch.from_numpy(ids),
        speech_cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        speech_padding=torch.from_numpy(padding_U),
        speech_kinds=torch.from_numpy(row.kinds),
        draws=torch.from_numpy(draws_U),
        context=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *context])),
    )
