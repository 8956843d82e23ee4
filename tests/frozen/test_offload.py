"""Frozen weights are on the device while they are used, and in the host's memory else."""

from __future__ import annotations

import pytest
import torch

from omni_train.frozen.offload import Offload


def frozen() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.BatchNorm1d(7)).eval().requires_grad_(False)


def places(module: torch.nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]


def test_weights_are_moved_there_and_back_and_say_the_same():
    module, other = frozen(), frozen()
    x = torch.randn(4, 3)
    expected, before = module(x), places(module)
    offload = Offload()
    offload.to_host([module])
    waiting = places(module)
    assert not set(waiting) & set(before)  # what lay on the device is given back
    with offload.on_device([module, other]):
        assert not set(places(module)) & set(waiting)
        assert torch.equal(module(x), expected)
    assert places(module) == waiting and torch.equal(module(x), expected)


def test_they_go_back_from_a_use_that_fails():
    module, offload = frozen(), Offload()
    offload.to_host([module])
    waiting = places(module)
    with pytest.raises(ZeroDivisionError), offload.on_device([module]):
        _ = 1 / 0
    assert places(module) == waiting


def test_others_stay_where_they_are():
    module, offload = frozen(), Offload()
    before = places(module)
    with offload.on_device([module]):
        assert places(module) == before
