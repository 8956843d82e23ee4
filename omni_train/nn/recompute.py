"""Activation recomputation that gives parameters their gradients whatever their inputs.

Megatron's function to do so (and torch's own of the reentrant kind) runs the layers without a graph and gives no
gradient to any parameter in them when none of their inputs needs one: behind a frozen embedding nothing would train,
and nothing would say so. Here the graph is that of the plain forward pass, and only what it saves is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch.utils import checkpoint as checkpointing

_again = ContextVar("again", default=False)


def checkpoint(function: Callable, *arguments: Any) -> Any:
    """Result of ``function(*arguments)``, whose graph saves only the arguments and recomputes the rest in backward.

    Nothing may be drawn at random in `function`. It is always rerun to its end: ranks that saved different tensors
    would otherwise stop at different points, before or behind a collective.
    """
    return checkpointing.checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _recomputation()),
        early_stop=False,
    )


def recomputing() -> bool:
    """Whether the caller is being recomputed for the backward pass, so that what it counts has been counted."""
    return _again.get()


def install() -> None:
    """Let all of Megatron's layers that recompute call :func:`checkpoint`. Idempotent."""
    from megatron.core import tensor_parallel

    tensor_parallel.checkpoint = _as_megatron_calls_it


def _as_megatron_calls_it(function: Callable, distribute_saved_activations: bool, *arguments: Any) -> Any:
    if distribute_saved_activations:
        raise NotImplementedError("distribute_saved_activations must be off: saved tensors stay on their rank")
    return checkpoint(function, *arguments)


@contextmanager
def _recomputation() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
