"""Device and ranks of this process: CUDA with NCCL, or the CPU with gloo."""

from omni_train.platform import parallel
from omni_train.platform.device import (
    device,
    has_cuda,
    init_distributed,
    joined,
    leave_distributed,
    local_rank,
    rank,
    setup,
    world_size,
)
from omni_train.platform.peak import peak_flops

__all__ = [
    "device",
    "has_cuda",
    "init_distributed",
    "joined",
    "leave_distributed",
    "local_rank",
    "parallel",
    "peak_flops",
    "rank",
    "setup",
    "world_size",
]
