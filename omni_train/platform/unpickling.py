"""Classes that ``torch.load`` may create from a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tensors_and(*classes: type) -> Iterator[None]:
    """Let ``torch.load`` with ``weights_only`` create only tensors, plain containers and objects of these classes.

    Those that libraries have registered are not among them. Megatron's thirty, numpy's arrays and types included, are
    not safe with untrusted files: a numpy type takes an array's bytes for pointers to objects where its state says so.

    Args:
        classes: classes whose construction does no more than hold data.
    """
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(list(classes))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(registered)
