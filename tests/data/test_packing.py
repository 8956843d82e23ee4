from __future__ import annotations

import bisect
import itertools
import random

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import IGNORE, MODALITIES, PackedBatch
from omni_train.data.rows.packing import aligned, best_fit, pack
from omni_train.data.rows.sequences import TokenSequence


def sequence(length: int, first: int, begins_sample: bool = True) -> TokenSequence:
    tokens = np.arange(first, first + length, dtype=np.int32)
    labels = np.append(tokens[1:], IGNORE).astype(np.int32)
    return TokenSequence(tokens, labels, begins_sample)


def alone(lengths: list[int]) -> list[tuple[int]]:
    return [(length,) for length in lengths]


def test_best_fit_takes_the_oldest_and_then_the_longest_that_fits():
    assert best_fit(alone([16, 64, 48, 32, 16, 48]), (128,)) == [0, 1, 2]
    assert best_fit(alone([96, 48, 16, 32, 16]), (128,)) == [0, 3]
    assert best_fit(alone([128, 16]), (128,)) == [0]
    assert best_fit(alone([32, 48, 48, 48]), (128,)) == [0, 1, 2]


def best_fit_by_bisection(lengths: list[int], row_tokens: int) -> list[int]:
    """Best fit as it was written for one length alone: rows of resumed runs depend on it."""
    chosen, room = [0], row_tokens - lengths[0]
    waiting = sorted((length, -index) for index, length in enumerate(lengths) if index > 0)
    while (fits := bisect.bisect_right(waiting, (room, 0))) > 0:
        length, index = waiting.pop(fits - 1)
        chosen.append(-index)
        room -= length
    return chosen


def test_of_one_length_best_fit_is_what_it_was():
    generator = random.Random(29)
    for _ in range(2000):
        lengths = [16 * generator.randrange(1, 26) for _ in range(generator.randrange(1, 30))]
        assert best_fit(alone(lengths), (400,)) == best_fit_by_bisection(lengths, 400)


@pytest.mark.parametrize("bounds", [(400,), (400, 96), (160, 400)])
def test_best_fit_never_overfills_and_leaves_no_room_for_any_that_waits(bounds):
    generator = random.Random(3)
    for _ in range(200):
        count = generator.randrange(1, 30)
        lengths = [tuple(generator.randrange(0, bound + 1, 16) for bound in bounds) for _ in range(count)]
        chosen = best_fit(lengths, bounds)
        room = [bound - sum(lengths[i][axis] for i in chosen) for axis, bound in enumerate(bounds)]
        assert len(set(chosen)) == len(chosen)
        assert chosen[0] == 0
        assert min(room) >= 0
        for i in set(range(count)) - set(chosen):
            assert any(length > free for length, free in zip(lengths[i], room, strict=True))


def test_of_two_lengths_the_larger_sum_of_shares_comes_first():
    assert best_fit([(10, 1), (20, 5), (60, 2), (5, 25), (5, 9)], (100, 40)) == [0, 3, 2, 1]
    assert best_fit([(10, 0), (91, 0), (90, 39), (0, 41)], (100, 40)) == [0, 2]


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


def heard_and_seen(length: int, first: int, clips: list[int], grids: list[tuple[int, int, int]]) -> TokenSequence:
    """A sequence with sound at its odd positions and patches at its even ones, all of recognisable values."""
    generator = np.random.default_rng(first)
    made = sequence(length, first)
    made.modality = MODALITIES.index("image" if grids else "audio")
    made.positions = np.stack([np.arange(length) + axis * 100 + first for axis in range(3)])
    made.mel = [generator.random((frames, 5), dtype=np.float32) for frames in clips]
    made.patches = [generator.integers(0, 256, (t * h * w, 7), dtype=np.uint8) for t, h, w in grids]
    made.grids = grids
    made.audio_slots = np.arange(1, length, 2) if clips else made.audio_slots
    made.vision_slots = np.arange(0, length, 2) if grids else made.vision_slots
    return made


def test_a_row_holds_the_media_of_its_sequences_in_order():
    sequences = [
        sequence(5, 100),
        heard_and_seen(7, 200, clips=[3, 9], grids=[]),
        heard_and_seen(9, 300, clips=[4], grids=[(1, 2, 4), (3, 2, 2)]),
        sequence(3, 400),
    ]
    row = pack(sequences, row_tokens=48, alignment=8, padding_token=9)
    starts = [0, 8, 16, 32]
    assert row.cu_seqlens.tolist() == [*starts, 40, 48]
    names = [MODALITIES[index] for index in row.modality.tolist()]
    assert (names[8:15], names[16:25]) == (["audio"] * 7, ["image"] * 9)
    assert {*names[:8], *names[15:16], *names[25:]} == {"text"}
    clips = [clip for made in sequences for clip in made.mel]
    assert torch.equal(row.mel, torch.from_numpy(np.concatenate(clips)))
    assert (row.mel_cu_seqlens.tolist(), row.mel_cu_seqlens.dtype) == ([0, 3, 12, 16], torch.int32)
    patches = [image for made in sequences for image in made.patches]
    assert torch.equal(row.patches, torch.from_numpy(np.concatenate(patches)))
    assert (row.grid_thw.tolist(), row.grid_thw.dtype) == ([[1, 2, 4], [3, 2, 2]], torch.int64)
    assert row.tokens[row.audio_slots].tolist() == [201, 203, 205, 301, 303, 305, 307]
    assert row.tokens[row.vision_slots].tolist() == [300, 302, 304, 306, 308]
    for start, made in zip(starts, sequences, strict=True):
        ids = row.position_ids[:, start : start + len(made)]
        expected = np.stack([np.arange(len(made))] * 3) if made.positions is None else made.positions
        assert torch.equal(ids, torch.from_numpy(expected))


def test_a_row_of_text_has_the_empty_media_of_a_packed_batch():
    row = pack([sequence(5, 100)], row_tokens=8, alignment=8, padding_token=9)
    empty = PackedBatch(row.tokens, row.labels, row.loss_weights, row.position_ids, row.cu_seqlens, row.padding)
    for name in PackedBatch.MEDIA:
        assert torch.equal(getattr(row, name), getattr(empty, name)), name


def test_rotary_ids_are_floats_where_a_sequence_or_the_recipe_has_floats():
    def ids(sequences: list[TokenSequence], **options) -> torch.Tensor:
        return pack(sequences, row_tokens=16, alignment=8, padding_token=9, **options).position_ids

    timed = sequence(6, 200)
    timed.positions = np.linspace(0, 2.5, 18, dtype=np.float32).reshape(3, 6)
    mixed = ids([sequence(5, 100), timed])
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[:, 8:14], torch.from_numpy(timed.positions))
    whole = ids([sequence(5, 100)])
    assert whole.dtype == torch.int64
    forced = ids([sequence(5, 100)], float_positions=True)
    assert forced.dtype == torch.float32
    assert torch.equal(forced, whole.float())
