"""flash-linear-attention's kernels, on a GPU as they are, on the CPU under Triton's interpreter.

`TRITON_INTERPRET=1` must be set before Triton is imported.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

from omni_train import platform


@dataclass
class FlaKernels:
    """Functions that Megatron's Gated DeltaNet takes from flash-linear-attention."""

    rule: Callable
    convolution: Callable
    l2norm: Callable


def fla_kernels() -> FlaKernels | None:
    """Kernels of flash-linear-attention; None where the package is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from omni_train.nn.backend import backend

    backend()  # which mends what this GPU's Triton breaks
    if not platform.has_cuda():
        _prepare_interpreter()
    from fla.modules.convolution import causal_conv1d
    from fla.modules.l2norm import l2norm
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return FlaKernels(chunk_gated_delta_rule, causal_conv1d, l2norm)


def _prepare_interpreter() -> None:
    """Repair Triton's interpreter, which gives plain numbers to a loop that asks its counter for `.to`."""
    import triton.language as tl
    from fla.ops.common import chunk_delta_h

    chunk_delta_h.range = lambda *bounds: (
        tl.full((), number, tl.int32) for number in builtins.range(*map(int, bounds))
    )


@contextlib.contextmanager
def first_configuration() -> Iterator[None]:
    """Context in which kernels run in their first configuration: trying all takes minutes, interpreted even longer."""
    from triton.runtime.autotuner import Autotuner

    with patch.object(Autotuner, "_bench", lambda self, *_, **__: [0.0]):
        yield


@contextlib.contextmanager
def few_configurations(most: int = 3) -> Iterator[None]:
    """Context in which kernels are tuned over a few of their configurations, in a third of the time of all."""
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def pruned(self, *arguments):
        left = prune(self, *arguments)
        return left[:: -(-len(left) // most)]

    with patch.object(Autotuner, "prune_configs", pruned):
        yield


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Context with :mod:`omni_train.nn.hopper_repair` in place, whether this machine needs it or not."""
    from fla.ops.gated_delta_rule import chunk

    from omni_train.nn.hopper_repair import chunk_bwd_dqkwg

    with patch.object(chunk, "chunk_bwd_dqkwg", chunk_bwd_dqkwg):
        yield
