"""Fixtures and markers for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from omni_train.platform import cpu_streams
from tests.support.pool import WorkerPool

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # several tests share the cores
cpu_streams.strict = True  # a wait that is missing fails here, as it would on a GPU


@pytest.fixture(scope="session")
def distributed() -> Iterator[Callable]:
    """Run a function on several gloo ranks: ``distributed(world_size, function, *args, timeout=120)``.

    ``function(rank, world_size, *args)`` runs in ``world_size`` worker processes (1 to 8) with ``torch.distributed``
    initialised on gloo and the CPU platform set up, one thread and no GPU each; the results come back as a list in rank
    order. The workers live on between tests, so a call costs milliseconds; process groups, Megatron's included, are
    destroyed after each call, and torch's seed is set to 0 before each.

    ``function`` must be at the top level of its module, and it, its arguments and its result must pickle. Tensors
    travel by value. A rank that raises, dies, or has not answered after ``timeout`` seconds fails the test with
    ``tests.support.pool.RankFailed``, whose message names the rank and carries its traceback::

        def total(rank, world_size, start):
            value = torch.tensor(float(start + rank))
            torch.distributed.all_reduce(value)
            return value

        def test_all_reduce_sums_over_ranks(distributed):
            assert distributed(3, total, 5) == [18.0, 18.0, 18.0]
    """
    pool = WorkerPool()
    yield pool.run
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and this machine has none"))
