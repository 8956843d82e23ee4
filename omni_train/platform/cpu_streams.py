"""CUDA streams, events and non-blocking copies on the CPU that stands in for a GPU.

A GPU runs kernels after the call, stream by stream, and reading a result too early is no error. The CPU has finished
when a call returns, so a missing wait would first show on a cluster. Where :data:`strict` is set, as the tests set it,
it shows here: what nobody has waited for reads as poison, NaN or a number far out of any range.

It gives exactly the guarantees that CUDA gives:

- A copy to the host that does not block (``.to("cpu", non_blocking=True)``, or ``copy_`` into pinned memory) has
  arrived once the host has waited for an event recorded after it, for its stream, or for the device. That another
  stream waits is not enough.
- What a stream other than the default one writes, copies included, is there for another stream once that one has waited
  for the stream or for an event recorded after the writing, or once the host has. The stream itself sees it at once.
- The default stream sees its own copies to the device at once.

Whether a stream waited before it *reads* what the default stream wrote is not checked.

Host and device share one memory here. The device is the one object :data:`CARD`; a copy that names the CPU by any other
goes to the host. Memory is pinned where it is asked for, which means nothing else here. DeepSpeed's copies are left
alone: it is told that its device is the CPU, and waits for no stream of ours.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CARD = torch.device("cpu")
"""Device of the platform where there is no GPU."""

strict = False
"""Whether unfinished work reads as poison. Set before the platform is set up."""


class _Write:
    """Pending write to a tensor, which holds poison while hidden, and its values once the write has arrived."""

    def __init__(self, tensor: Tensor, to_host: bool) -> None:
        self.tensor = tensor.data  # the same memory, whose changes autograd does not count
        self.to_host = to_host
        self.values: Tensor | None = None
        self.arrived = False

    def hide(self) -> None:
        if self.values is None and not self.arrived:
            self.values = self.tensor.clone()
            self.tensor.fill_(poison(self.tensor.dtype))

    def show(self) -> None:
        if self.values is not None:
            self.tensor.copy_(self.values)
            self.values = None

    def arrive(self) -> None:
        self.show()
        self.arrived = True


def poison(dtype: torch.dtype) -> float | int | bool:
    """Value of the elements of a tensor of this type that has not been written yet."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype is torch.bool:
        return True
    bounds = torch.iinfo(dtype)
    return bounds.min if bounds.min else bounds.max


class Stream:
    """Emulation of ``torch.cuda.Stream``."""

    def __init__(self, *_, **__) -> None:
        self.writes: list[_Write] = []
        self._contexts: list[contextlib.AbstractContextManager] = []

    def __enter__(self):
        self._contexts.append(on_stream(self))
        self._contexts[-1].__enter__()
        return self

    def __exit__(self, *error):
        return self._contexts.pop().__exit__(*error)

    def add(self, tensor: Tensor, to_host: bool) -> _Write:
        """Record that the stream writes `tensor`."""
        kept = [write for write in self.writes if not write.arrived]
        for earlier in kept:  # of what is written twice there is only the second writing to wait for
            if earlier.tensor.data_ptr() == tensor.data_ptr() and earlier.tensor.shape == tensor.shape:
                earlier.values, earlier.arrived = None, True
        write = _Write(tensor, to_host)
        self.writes = [*kept, write]
        _on_the_way[:] = [other for other in _on_the_way if not other.arrived] + [write]
        return write

    def wait_stream(self, stream: Stream) -> None:
        self._wait(stream.writes)

    def wait_event(self, event: Event) -> None:
        self._wait(event.writes)

    def _wait(self, writes: list[_Write]) -> None:
        for write in reversed(writes):
            if not write.to_host:
                write.arrive()
            elif not write.arrived:
                self.writes.append(write)  # the host has not waited, but will have when it waits for this stream

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        _arrive(self.writes)


class Event:
    """Emulation of ``torch.cuda.Event``."""

    def __init__(self, *_, **__) -> None:
        self.writes: list[_Write] = []

    def record(self, stream: Stream | None = None) -> None:
        self.writes = list((stream or _current).writes)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _current).wait_event(self)

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        _arrive(self.writes)


_default = _current = Stream()
_on_the_way: list[_Write] = []  # to the host, or written by another stream than the default one


def _arrive(writes: list[_Write]) -> None:
    for write in reversed(writes):  # what was hidden last is shown first, should they overlap
        write.arrive()
    writes.clear()


def synchronize(device=None) -> None:
    """Emulation of ``torch.cuda.synchronize``."""
    _arrive(_on_the_way)


def current_stream(device=None) -> Stream:
    """Emulation of ``torch.cuda.current_stream``."""
    return _current


def set_stream(stream: Stream) -> None:
    """Emulation of ``torch.cuda.set_stream``. What is written after it is hidden only within :func:`on_stream`."""
    global _current
    if _current is not _default:
        for write in _current.writes:
            if not write.to_host:
                write.hide()
    _current = stream
    for write in reversed(stream.writes):
        if not write.to_host:
            write.show()


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Emulation of ``torch.cuda.stream``."""
    if stream is None or stream is _current:
        yield
        return
    before = _current
    set_stream(stream)
    try:
        with _Recorder(stream) if strict and stream is not _default else contextlib.nullcontext():
            yield
    finally:
        set_stream(before)


class _Recorder(TorchDispatchMode):
    """Records what a stream writes: results that are no views, and arguments that an operation changes."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if _current is not self.stream:
            return out
        schema = function._schema
        results = out if isinstance(out, tuple | list) and len(schema.returns) > 1 else [out]
        fresh = [value for value, result in zip(results, schema.returns, strict=False) if result.alias_info is None]
        arguments = [*zip(schema.arguments, args, strict=False)]
        arguments += [(argument, kwargs.get(argument.name)) for argument in schema.arguments]
        changed = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
        for value in (*fresh, *changed):
            if isinstance(value, Tensor):
                self.stream.add(value, to_host=False)
        return out


def to_host(tensor: Tensor) -> Tensor:
    """Non-blocking copy of a tensor to the host."""
    with _disable_current_modes():
        copy = tensor.clone()
        _current.add(copy, to_host=True).hide()
    return copy


def _to_card(tensor: Tensor) -> Tensor:
    """Copy of a tensor on the device, in its own memory if a stream makes it that others have to wait for."""
    return tensor if _current is _default else tensor.clone()


def pin(tensor: Tensor) -> Tensor:
    """Mark `tensor` as in pinned memory, and return it."""
    tensor._pinned = True
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Whether `tensor`, or what it is a view of, is in pinned memory."""
    return hasattr(tensor, "_pinned") or hasattr(tensor._base, "_pinned")


def _names_the_host(device) -> bool:
    if isinstance(device, str):
        return device == "cpu"
    return isinstance(device, torch.device) and device.type == "cpu" and device is not CARD


def _is_deepspeed() -> bool:
    """Whether the caller of the emulated function is DeepSpeed."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("deepspeed.")


def _copy_as_a_gpu_does() -> None:
    """Let non-blocking copies arrive when they are waited for."""
    to, copy_ = torch.Tensor.to, torch.Tensor.copy_

    @functools.wraps(to)
    def tensor_to(self, *args, **kwargs):
        out = to(self, *args, **kwargs)
        device = args[0] if args else kwargs.get("device")
        if _is_deepspeed() or not isinstance(device, str | torch.device):
            return out
        if not _names_the_host(device):
            return _to_card(out)
        return to_host(out) if kwargs.get("non_blocking", args[2] if len(args) > 2 else False) else out

    @functools.wraps(copy_)
    def tensor_copy_(self, source, non_blocking=False):
        copy_(self, source, non_blocking)
        if non_blocking and is_pinned(self) and not is_pinned(source) and not _is_deepspeed():
            with _disable_current_modes():
                _current.add(self, to_host=True).hide()
        return self

    torch.Tensor.to, torch.Tensor.copy_ = tensor_to, tensor_copy_
    torch.Tensor.cuda = lambda self, *_, **__: _to_card(self)


def _move_counts_as_a_gpu_does() -> None:
    """Let Megatron's token dispatcher copy to the host, which it leaves out where a tensor is not on a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        if not isinstance(tensor, Tensor):
            return tensor
        moved = to_host(tensor)
        return moved.numpy() if as_numpy else moved

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def install() -> None:
    """Replace CUDA's streams, events and copies by these."""
    cuda = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream, cuda.default_stream = current_stream, lambda device=None: _default
    cuda.stream, cuda.set_stream, cuda.synchronize = on_stream, set_stream, synchronize
    torch.Tensor.pin_memory = lambda self, device=None: pin(self.clone())
    torch.Tensor.is_pinned = lambda self, device=None: is_pinned(self)
    if strict:
        _copy_as_a_gpu_does()
        _move_counts_as_a_gpu_does()
