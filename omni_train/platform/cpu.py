"""Emulation that lets Megatron's CUDA-only code run on a machine without CUDA.

Megatron asks for CUDA devices, streams and generators by name. Where there is none, :func:`install` answers those
questions with the CPU (or with ``meta``, for planning), once for the process. Everything the emulation touches is in
this file and :mod:`omni_train.platform.cpu_streams`; no other room knows that it exists.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch.utils._device import _device_constructors

from omni_train.platform import cpu_streams

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


_device = cpu_streams.CARD


def _is_cuda(value) -> bool:
    """Whether a device argument means CUDA. A bare number is a CUDA device too."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, int) and not isinstance(value, bool)


def _redirect_devices() -> None:
    """Let functions that take a CUDA device take the one that stands in for it.

    Only functions that take a device are wrapped. A ``TorchFunctionMode`` would be shorter, but it stands before every
    torch call, and made the small products of Gated DeltaNet several times slower.
    """

    def redirected(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _device
            pinned = kwargs.pop("pin_memory", False)
            out = function(*args, **kwargs)
            return cpu_streams.pin(out) if pinned else out

        return call

    for constructor in _device_constructors():
        name = constructor.__name__
        if getattr(torch, name, None) is constructor:
            setattr(torch, name, redirected(constructor))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, redirected(getattr(torch.Tensor, name)))

    to, type_name = torch.Tensor.to, torch.Tensor.type

    def tensor_to(self, *args, **kwargs):
        if args and not isinstance(args[0], int) and _is_cuda(args[0]):
            args = (_device, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _device
        return to(self, *args, **kwargs)

    def tensor_type(self, *args, **kwargs):
        if args or kwargs:
            return type_name(self, *args, **kwargs)
        # The distributed optimizer sorts parameters by this name.
        return _CUDA_TYPE_NAMES.get(self.dtype) or type_name(self)

    torch.Tensor.to, torch.Tensor.type = tensor_to, tensor_type
    torch.Tensor.cuda = lambda self, *_, **__: self


@contextlib.contextmanager
def _fork(self, name="model-parallel-rng"):
    """Draw from the tracked random state `name`, as ``CudaRNGStatesTracker.fork`` does.

    The original also warns when the CPU generator moves, which is exactly what must happen here.
    """
    if name not in self.states_:
        raise KeyError(f"random state {name} was never added")
    outer = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


def _take_tensor_splits() -> None:
    """Let ``all_to_all_single`` take split sizes as tensors, as NCCL's does and gloo's does not."""
    original = torch.distributed.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, *args, **kwargs):
        splits = [
            sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
            for sizes in (output_split_sizes, input_split_sizes)
        ]
        return original(output, input, *splits, *args, **kwargs)

    torch.distributed.all_to_all_single = all_to_all_single


def _exchange_uneven_parts() -> None:
    """Let ``all_gather`` and ``reduce_scatter`` take parts of unequal length, as NCCL's do and gloo's do not.

    Expert tensor parallelism exchanges as many rows as each rank happened to route. The parts travel by all-to-all.
    """
    distributed = torch.distributed
    original_gather = distributed.all_gather

    def all_gather(tensor_list, tensor, group=None, async_op=False):
        sizes = [len(part) for part in tensor_list]
        if len(set(sizes)) == 1:
            return original_gather(tensor_list, tensor, group=group, async_op=async_op)
        assert not async_op
        received = tensor.new_empty(sum(sizes), *tensor.shape[1:])
        sent = torch.cat([tensor] * len(sizes))
        distributed.all_to_all_single(received, sent, sizes, [len(tensor)] * len(sizes), group=group)
        for part, values in zip(tensor_list, received.split(sizes), strict=True):
            part.copy_(values)
        return None

    def reduce_scatter(output, input_list, op=distributed.ReduceOp.SUM, group=None, async_op=False):
        assert op == distributed.ReduceOp.SUM and not async_op
        received = output.new_empty(len(input_list), *output.shape)
        sizes = [len(part) for part in input_list]
        distributed.all_to_all_single(
            received.flatten(0, 1), torch.cat(input_list), [len(output)] * len(sizes), sizes, group=group
        )
        output.copy_(received.sum(0))

    distributed.all_gather, distributed.reduce_scatter = all_gather, reduce_scatter


_installed = False


def install(device: str = "cpu") -> None:
    """Answer Megatron's CUDA calls with `device` ("cpu", or "meta" to build without memory). Idempotent.

    Must run before the first import of Megatron: its modules read some of these names, and bind the fusion decorator,
    when they are imported.
    """
    global _installed, _device
    _device = cpu_streams.CARD if device == "cpu" else torch.device(device)
    if _installed:
        return
    _installed = True

    cuda = torch.cuda
    cuda.is_available = lambda: False  # torch would ask `device_count` where NVML may answer
    cuda.current_device = lambda: _device
    cuda.device_count = lambda: 1
    cuda.set_device = lambda _device: None
    cuda.empty_cache = lambda: None
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.is_current_stream_capturing = lambda: False
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
    torch.nn.Module.cuda = lambda self, device=None: self

    # Fusing through a compiler would start a C++ toolchain in every process. Importing any of Megatron binds the fusion
    # decorator, so the compiler must be out of sight before Megatron's own switch can be reached.
    compiler, torch.compile = torch.compile, lambda function=None, **_: function or (lambda decorated: decorated)
    from megatron.core import jit

    jit.disable_jit_fuser()
    torch.compile = compiler

    _redirect_devices()
    cpu_streams.install()
    _take_tensor_splits()
    _exchange_uneven_parts()

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random.CudaRNGStatesTracker.fork = _fork
