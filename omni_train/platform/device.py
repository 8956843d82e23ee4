"""Which device this process computes on, and how its ranks talk. The only place that asks for CUDA."""

from __future__ import annotations

import datetime
import gc
import os

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
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CARD


def rank() -> int:
    """This process among all, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process among those of its machine, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of processes, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(timeout_seconds: int = 1800) -> None:
    """Join the other processes: NCCL between GPUs, gloo otherwise. A lone process needs no launcher.

    `timeout_seconds` bounds every collective, so that a lost rank ends the run instead of hanging it. After
    :func:`leave_distributed` the same processes may join again.
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
    # The ranks find each other by what they write there, which must not be what they wrote the time before.
    store = torch.distributed.PrefixStore(f"joined_{_joined}", _store)
    store.set_timeout(timeout)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if has_cuda() else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=timeout,
    )


def store() -> torch.distributed.Store:
    """Where the ranks found each other. They have joined."""
    if _store is None:
        raise RuntimeError("this process has not joined the others")
    return _store


def leave_distributed() -> None:
    """Part from the other processes, and give back the memory that nothing refers to any more."""
    torch.distributed.destroy_process_group()
    gc.collect()  # Megatron's modules and their hooks refer to each other
    if has_cuda():
        torch.cuda.empty_cache()
