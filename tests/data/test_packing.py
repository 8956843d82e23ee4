from __future__ import annotations

import itertools
import random

import numpy as np
import torch

from omni_train.data.batch import IGNORE
from omni_train.data.chat import TokenSequence
from omni_train.data.packing import aligned, best_fit, pack


def sequence(length: int, first: int, begins_sample: bool = True) -> TokenSequence:
    tokens = np.arange(first, first + length, dtype=np.int32)
    labels = np.append(tokens[1:], IGNORE).astype(np.int32)
    return TokenSequence(tokens, labels, begins_sample)


def test_best_fit_takes_the_oldest_and_then_the_longest_that_fits():
    assert best_fit([16, 64, 48, 32, 16, 48], 128) == [0, 1, 2]
    assert best_fit([96, 48, 16, 32, 16], 128) == [0, 3]
    assert best_fit([128, 16], 128) == [0]
    assert best_fit([32, 48, 48, 48], 128) == [0, 1, 2]


def test_best_fit_never_overfills_and_leaves_no_room_for_any_that_waits():
    generator = random.Random(3)
    for _ in range(200):
        lengths = [generator.randrange(16, 401, 16) for _ in range(generator.randrange(1, 30))]
        chosen = best_fit(lengths, 400)
        room = 400 - sum(lengths[i] for i in chosen)
        assert len(set(chosen)) == len(chosen)
        assert 0 in chosen
        assert room >= 0
        assert all(lengths[i] > room for i in range(len(lengths)) if i not in chosen)


def test_a_row_holds_its_sequences_padding_and_boundaries():
    row = pack([sequence(5, 100), sequence(8, 200, begins_sample=False)], row_tokens=24, alignment=8, padding_token=9)
    assert row.cu_seqlens.tolist() == [0, 8, 16, 24]
    assert row.cu_seqlens.dtype == torch.int32
    assert row.tokens.tolist() == [*range(100, 105), 9, 9, 9, *range(200, 208), *[9] * 8]
    assert row.labels.tolist() == [*range(101, 105), *[IGNORE] * 4, *range(201, 208), *[IGNORE] * 9]
    assert row.padding.tolist() == [False] * 5 + [True] * 3 + [False] * 8 + [True] * 8
    assert row.position_ids.tolist() == [[*range(8)] * 3] * 3
    assert row.loss_weights.tolist() == [float(label != IGNORE) for label in row.labels.tolist()]
    assert row.num_loss_tokens == 11
    assert row.samples == 1
    assert row.max_seqlen == 8


def test_a_full_row_has_no_last_sequence_of_padding():
    row = pack([sequence(16, 0), sequence(15, 50)], row_tokens=32, alignment=16, padding_token=9)
    assert row.cu_seqlens.tolist() == [0, 16, 32]


def test_every_boundary_is_aligned():
    sequences = [sequence(length, 0) for length in (3, 17, 31)]
    row = pack(sequences, row_tokens=160, alignment=16, padding_token=9)
    assert row.cu_seqlens.tolist() == [0, *itertools.accumulate(aligned(len(s), 16) for s in sequences), 160]
