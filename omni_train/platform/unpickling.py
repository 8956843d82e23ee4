"""What ``torch.load`` may make of a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tensors_and(*classes: type) -> Iterator[None]:
    """Let ``torch.load``, with ``weights_only``, make tensors, plain containers and objects of these classes.

    Not of those that libraries have registered. Megatron's thirty, numpy's arrays and types among them, were not made
    to be read from strangers: a type of numpy's takes an array's bytes for pointers to objects where its state says so.

    Args:
        classes: none of which does more than hold data when one is made.
    """
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(classes))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)
