"""Activations computed anew in the backward pass, of parameters behind any inputs.

Megatron's function to do so (and torch's own of the reentrant kind) runs the layers without a graph and gives no
gradient to any parameter in them when none of their inputs needs one: behind a frozen embedding nothing would train,
and nothing would say so. Here the graph is that of the plain forward pass, and only what it keeps is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch.utils import checkpoint as checkpointing

_again = ContextVar("again", default=False)


def checkpoint(function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)``, of which the graph keeps nothing but the arguments until its backward pass.

    Nothing may be drawn at random in `function`. It is always run anew to its end: ranks that kept different tensors
    would otherwise stop at different places, before or behind a collective.
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
    """Whether the caller runs for the backward pass alone, and has run before: what it counts has been counted."""
    return _again.get()


def install() -> None:
    """Put :func:`checkpoint` in the place of Megatron's, in all of its layers that recompute."""
    from megatron.core import tensor_parallel

    tensor_parallel.checkpoint = _as_megatron_calls_it


def _as_megatron_calls_it(function: Callable, distribute_saved_activations: bool, *arguments: Any) -> Any:
    if distribute_saved_activations:
        raise NotImplementedError("distribute_saved_activations: what is kept here stays on its rank")
    return checkpoint(function, *arguments)


@contextmanager
def _recomputation() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
