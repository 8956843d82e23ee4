"""What omni_train relies on of torch's insides."""

from __future__ import annotations

import os
import pickle
import sys

import pytest
import torch

from tests.canaries.table import relied_on

STREAMS = "omni_train/platform/cpu_streams.py"


@relied_on("torch", "a dispatch mode sees operations, and none within _disable_current_modes", STREAMS)
def test_dispatch_modes():
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2).add_(1)
        with _disable_current_modes():
            torch.ones(2).mul_(1)
    assert torch.ops.aten.add_.Tensor in seen
    assert torch.ops.aten.mul_.Tensor not in seen


@relied_on("torch", "an operation's schema tells which arguments it changes, and which results are views", STREAMS)
def test_schemas():
    changed = torch.ops.aten.add_.Tensor._schema
    assert [bool(one.alias_info and one.alias_info.is_write) for one in changed.arguments] == [True, False, False]
    assert torch.ops.aten.view.default._schema.returns[0].alias_info is not None
    assert torch.ops.aten.add.Tensor._schema.returns[0].alias_info is None


@relied_on("torch", "a view knows its base", STREAMS)
def test_bases():
    whole = torch.zeros(4)
    assert whole[1:][1:]._base is whole
    assert whole._base is None


@relied_on(
    "torch", "its list of functions that take a device has those that make tensors", "omni_train/platform/cpu.py"
)
def test_device_constructors():
    from torch.utils._device import _device_constructors

    names = {function.__name__ for function in _device_constructors()}
    assert names >= {"arange", "empty", "full", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros"}


@relied_on("torch", "_foreach_mul_ scales tensors in place as mul_ does", "omni_train/training/engines/deepspeed.py")
def test_foreach():
    ours = [torch.randn(5), torch.randn(3, 2)]
    theirs = [tensor.clone().mul_(1 / 3) for tensor in ours]
    torch._foreach_mul_(ours, 1 / 3)
    assert all(map(torch.equal, ours, theirs))


@relied_on(
    "torch", "CPU attention gives log denominators, and backward takes a whole's", "omni_train/nn/packed_attention.py"
)
def test_flash_on_cpu():
    from omni_train.nn.packed_attention import _flash, _flash_backward

    q, k, v = (torch.randn(1, 2, length, 8) for length in (3, 5, 5))
    out, log = _flash(q, k, v, 0.0, False, scale=0.5)
    scores = q @ k.mT * 0.5
    torch.testing.assert_close(log, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    first, _ = _flash(q, k, v, 0.0, True, scale=0.5)
    torch.testing.assert_close(first[:, :, 0], v[:, :, 0])  # the triangle begins at the first key
    gradients = _flash_backward(torch.ones_like(out), q, k, v, out, log, 0.0, False, scale=0.5)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


@relied_on(
    "torch", "modules are moved by _apply and filled by _load_from_state_dict", "omni_train/models/codec/codebooks.py"
)
def test_module_hooks():
    called = []

    class Leaf(torch.nn.Linear):
        def _apply(self, fn, recurse=True):
            called.append("moved")
            return super()._apply(fn, recurse)

        def _load_from_state_dict(self, *args, **kwargs):
            called.append("filled")
            super()._load_from_state_dict(*args, **kwargs)

    module = torch.nn.Sequential(Leaf(2, 2))
    module.to(torch.float64)
    assert called == ["moved"]
    module.load_state_dict(module.state_dict())
    assert called == ["moved", "filled"]


@relied_on("torch", "with TORCHELASTIC_USE_AGENT_STORE all ranks join a store that is there", "omni_train/launch.py")
def test_agent_store(monkeypatch):
    from torch.distributed import TCPStore, rendezvous

    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": served.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RUN_ID": "a",
    }.items():
        monkeypatch.setenv(name, str(value))
    served_too: list[bool] = []

    def join(*args, is_master: bool, **options):
        served_too.append(is_master)
        return TCPStore(*args, is_master=is_master, **options)

    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "TCPStore", join)
    store, rank, size = next(rendezvous("env://"))
    store.set("said", "here")
    assert (rank, size, served.get("said"), served_too) == (0, 1, b"here", [False])


@relied_on("torch", "the ranks' store is _get_default_store's", "omni_train/errors.py")
def test_default_store(alone):
    found = torch.distributed.distributed_c10d._get_default_store
    assert found().add("counted", 1) == 1
    assert found().add("counted", 1) == 2


@relied_on("torch", "its refusal of a pickle says GLOBAL and the name", "omni_train/checkpoint/state_files.py")
def test_refusals_name_what_they_refuse(tmp_path):
    from omni_train.checkpoint.state_files import named_in

    torch.save(os.system, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError) as refused:
        torch.load(tmp_path / "state.pt", weights_only=True)
    assert named_in(refused.value) == "posix.system"
