"""A process that is all the ranks there are, for what needs process groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from omni_train import platform
from omni_train.recipe.schema import ParallelConfig


@pytest.fixture
def alone(monkeypatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    platform.setup()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    platform.parallel.initialize(ParallelConfig(), seed=1)
    yield
    platform.parallel.destroy()
    torch.distributed.destroy_process_group()
