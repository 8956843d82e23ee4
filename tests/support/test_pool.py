"""The pool that all distributed tests rest on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.pool import RankFailed


def total(rank: int, world_size: int, start: int) -> torch.Tensor:
    value = torch.tensor(float(start + rank))
    dist.all_reduce(value)
    return value


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def fail_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the lost key")
    dist.barrier()


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    time.sleep(600)


def test_results_come_back_in_rank_order_for_any_world_size(distributed):
    assert distributed(3, total, 5) == [18.0] * 3
    assert distributed(1, total, 5) == [5.0]
    assert distributed(2, total, 5) == [11.0] * 2


def test_workers_live_on_between_calls(distributed):
    assert distributed(2, process_id) == distributed(3, process_id)[:2]


def test_a_failing_rank_is_named_and_the_pool_goes_on(distributed):
    with pytest.raises(RankFailed, match=r"(?s)^rank 1 of 2: .*fail_on_rank_1.*KeyError: 'the lost key'"):
        distributed(2, fail_on_rank_1)
    assert distributed(2, total, 5) == [11.0] * 2


def test_a_dead_worker_is_reported_and_replaced(distributed):
    with pytest.raises(RankFailed, match="rank 1 of 2: the worker died with exit code 7"):
        distributed(2, die_on_rank_1)
    assert distributed(1, total, 5) == [5.0]


def test_a_hang_is_reported_and_the_pool_starts_afresh(distributed):
    with pytest.raises(RankFailed, match=r"ranks \[0\] of 1 had not answered after 2 s"):
        distributed(1, hang, timeout=2)
    assert distributed(1, total, 5) == [5.0]


def test_too_many_ranks_are_refused(distributed):
    with pytest.raises(ValueError, match="world_size=9"):
        distributed(9, total, 0)
