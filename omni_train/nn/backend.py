"""Kernels of the layers: Transformer Engine and flash-linear-attention on a GPU that has them, else plain torch.

The only module that imports a GPU kernel library. Both backends hold the same parameters under the same names, so a
checkpoint of one loads in the other.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from omni_train import platform
from omni_train.platform.logs import warn


@dataclass(frozen=True)
class Backend:
    """Classes that layers are built from."""

    name: str
    column_linear: type
    row_linear: type
    norm: Callable  # RMSNorm, zero-centred where the model says so
    plain_norm: type  # RMSNorm, always plain
    core_attention: type


@functools.cache
def backend() -> Backend:
    """Backend of this process. Warns once where a GPU runs without its kernels."""
    platform.setup()
    from omni_train.nn.attention import PackedAttention
    from omni_train.nn.norm import RMSNorm, model_norm
    from omni_train.nn.recompute import install

    norms = {"norm": model_norm, "plain_norm": RMSNorm}
    on_gpu = platform.has_cuda()
    install()
    _install_delta_rule(on_gpu)
    if on_gpu and importlib.util.find_spec("transformer_engine"):
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TERowParallelLinear,
        )

        return Backend(
            "transformer_engine",
            TEColumnParallelLinear,
            TERowParallelLinear,
            **norms,
            core_attention=TEDotProductAttention,
        )
    if on_gpu:
        warn(
            "transformer-engine is not installed: linear layers and attention run on plain torch, several times slower"
        )
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    return Backend("torch", ColumnParallelLinear, RowParallelLinear, **norms, core_attention=PackedAttention)


def _install_delta_rule(on_gpu: bool) -> None:
    """Use flash-linear-attention's kernels on a GPU that has them, and plain torch elsewhere."""
    if on_gpu and importlib.util.find_spec("fla"):
        _repair_fla()  # Megatron has bound the rest at import
        return
    if on_gpu:
        warn("flash-linear-attention is not installed: Gated DeltaNet runs on plain torch, many times slower")
    from omni_train.nn.delta_rule import install_cpu_kernels

    install_cpu_kernels()


def _repair_fla() -> None:
    """Replace the one kernel that Triton from 3.4 to before 3.7.1 compiles wrongly on a Hopper GPU."""
    from fla import utils
    from fla.ops.gated_delta_rule import chunk

    broken = utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1
    if broken and not importlib.util.find_spec("tilelang"):
        from omni_train.nn.hopper_repair import chunk_bwd_dqkwg

        warn("Triton before 3.7.1 compiles a kernel of Gated DeltaNet wrongly on this GPU: plain torch takes its place")
        chunk.chunk_bwd_dqkwg = chunk_bwd_dqkwg
