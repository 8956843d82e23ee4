"""Which device this process computes on, and how its ranks talk. The only place that asks for CUDA."""

from __future__ import annotations

import datetime
import os

import torch

from omni_train.platform.quiet import quiet

_ready = False


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
    _ready = True


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


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

    `timeout_seconds` bounds every collective, so that a lost rank ends the run instead of hanging it.
    """
    setup()
    if torch.distributed.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
