"""The context-parallel cut of a packed row: Megatron's own layout, complete, and undone by its inverse."""

import pytest
import torch

from omni_train.nn.context_parallel import context_key_indices, context_restore_indices, context_slice_indices

CU_SEQLENS = torch.tensor([0, 24, 24, 72, 84], dtype=torch.int32)


def test_a_rank_holds_two_mirrored_pieces_of_each_sequence():
    cu_seqlens = torch.tensor([0, 4, 12])
    assert context_slice_indices(cu_seqlens, 0, 2).tolist() == [0, 3, 4, 5, 10, 11]
    assert context_slice_indices(cu_seqlens, 1, 2).tolist() == [1, 2, 6, 7, 8, 9]


def test_one_rank_holds_the_row_as_it_is():
    assert torch.equal(context_slice_indices(CU_SEQLENS, 0, 1), torch.arange(84))


@pytest.mark.parametrize("size", [2, 3])
def test_restoring_undoes_the_cut(size):
    row = torch.randn(84, 2)
    gathered = torch.cat([row[context_slice_indices(CU_SEQLENS, rank, size)] for rank in range(size)])
    assert torch.equal(gathered[context_restore_indices(CU_SEQLENS, size)], row)


def megatron_order(rank, world_size, cu_seqlens, size):
    from megatron.core.ssm.gated_delta_net.common import _build_thd_cp_a2a_perm

    return _build_thd_cp_a2a_perm(cu_seqlens, size, int(cu_seqlens[-1]))[0]


@pytest.mark.parametrize("size", [2, 3])
def test_the_layout_is_the_one_megatrons_delta_net_expects(distributed, size):
    cu_seqlens = torch.tensor([0, 24, 72, 84], dtype=torch.int32)
    (expected,) = distributed(1, megatron_order, cu_seqlens, size)
    assert torch.equal(context_restore_indices(cu_seqlens, size), expected)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_piece_sees_its_sequence_up_to_its_own_end(size):
    for rank in range(size):
        mine = context_slice_indices(CU_SEQLENS, rank, size)
        keys, boundaries_q, boundaries_k = context_key_indices(CU_SEQLENS, rank, size)
        seen = torch.zeros(len(mine), dtype=torch.bool)
        for piece in range(len(boundaries_q) - 1):
            q = mine[boundaries_q[piece] : boundaries_q[piece + 1]].tolist()
            seen[boundaries_q[piece] : boundaries_q[piece + 1]] = True
            if q:
                start = max(boundary for boundary in CU_SEQLENS.tolist() if boundary <= q[0])
                assert keys[boundaries_k[piece] : boundaries_k[piece + 1]].tolist() == list(range(start, q[-1] + 1))
        assert seen.all()
        assert len(keys) == 84 + 84 // (2 * size)


def test_lengths_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        context_slice_indices(torch.tensor([0, 16, 20]), 0, 4)
