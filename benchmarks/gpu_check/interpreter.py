"""flash-linear-attention's kernels, on a GPU as they are, on the CPU under Triton's interpreter.

`TRITON_INTERPRET=1` must be set before Triton is imported.
"""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from omni_train import platform


@dataclass
class FlaKernels:
    """The functions that Megatron's Gated DeltaNet takes from flash-linear-attention."""

    rule: Callable
    convolution: Callable
    l2norm: Callable


def fla_kernels() -> FlaKernels | None:
    """The kernels, None where the package is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    if not platform.has_cuda():
        _prepare_interpreter()
    from fla.modules.convolution import causal_conv1d
    from fla.modules.l2norm import l2norm
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return FlaKernels(chunk_gated_delta_rule, causal_conv1d, l2norm)


def _prepare_interpreter() -> None:
    """What the interpreter lacks for these kernels: time to measure them by, and numbers of loops that are tensors."""
    import triton.language as tl
    from fla.ops.common import chunk_delta_h
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *_, **__: [0.0]  # the first configuration will do
    # Its loop calls `.to` on the counter, which Python's range gives as a plain number.
    chunk_delta_h.range = lambda *bounds: (
        tl.full((), number, tl.int32) for number in builtins.range(*map(int, bounds))
    )
