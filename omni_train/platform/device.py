"""Device of this process, and the process group of its ranks. The only module that asks for CUDA."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator

import torch

from omni_train.platform.cpu_streams import CARD
from omni_train.platform.quiet import quiet
from omni_train.processes import die_with_parent

_ready = False
_store: torch.distributed.Store | None = None  # where the ranks find each other, for the life of the process
_joined = 0


def has_cuda() -> bool:
    """Whether this process computes on a GPU."""
    return torch.version.cuda is not None and torch.cuda.is_available()


def setup() -> None:
    """Choose CUDA or the CPU for this process and prepare Megatron for it. Idempotent; before any Megatron import."""
    global _ready
    if _ready:
        return
    quiet()
    # Megatron's sequence parallelism overlaps its collectives with products only when kernels start in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda():
        torch.cuda.set_device(local_rank())
    else:
        from omni_train.platform import cpu

        cpu.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # rather than train on beside a new run
    _ready = True


def device() -> torch.device:
    """Device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CARD


def rank() -> int:
    """Rank of this process among all, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Rank of this process on its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(timeout_seconds: int = 1800) -> None:
    """Initialise the process group: NCCL between GPUs, gloo otherwise. A lone process needs no launcher.

    After :func:`leave_distributed` the same processes may join again.

    Args:
        timeout_seconds: bound on every collective, so that a lost rank ends the run instead of hanging it.
    """
    global _store, _joined
    setup()
    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if _store is None:
        launched = "RANK" in os.environ
        _store = next(torch.distributed.rendezvous("env://"))[0] if launched else torch.distributed.HashStore()
    _joined += 1
    # A prefix of its own: what the ranks wrote in an earlier rendezvous must not be read in this one.
    store = torch.distributed.PrefixStore(f"joined_{_joined}", _store)
    store.set_timeout(timeout)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if has_cuda() else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
    )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Context in a process group: the one that there is, else one that is left again."""
    already = torch.distributed.is_initialized()
    init_distributed()
    try:
        yield
    finally:
        if not already:
            leave_distributed()


def store() -> torch.distributed.Store:
    """Key-value store of the ranks' rendezvous.

    Raises:
        RuntimeError: :func:`init_distributed` has not been called.
    """
    if _store is None:
        raise RuntimeError("init_distributed() must come first: this process has not joined the others")
    return _store


def leave_distributed() -> None:
    """Destroy the process group, and free the memory that nothing refers to any more."""
    torch.distributed.destroy_process_group()
    gc.collect()  # Megatron's modules and their hooks refer to each other
    if has_cuda():
        torch.cuda.empty_cache()
