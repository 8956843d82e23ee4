"""Agreement among the ranks, so that none waits in a collective for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable

import torch

from omni_train.errors import UserError
from omni_train.platform.device import device


def agree(problem: str | None) -> str | None:
    """Problem of the first rank that has one, on all ranks; None where none has. Collective."""
    if not torch.distributed.is_initialized():
        return problem
    if not anywhere(problem is not None):
        return None
    problems: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    return next(filter(None, problems))


def anywhere(value: bool) -> bool:
    """Whether `value` is true on any rank. Collective."""
    if not torch.distributed.is_initialized():
        return value
    flag = torch.tensor(float(value), device=device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def on_first_rank[T](call: Callable[[], T]) -> T:
    """Result of a call that only the first rank makes, on all ranks. Collective.

    Args:
        call: its result must be picklable.

    Raises:
        UserError: the call raised it, on all ranks.
    """
    if not torch.distributed.is_initialized():
        return call()
    outcome: object = _Waiting()
    if torch.distributed.get_rank() == 0:
        try:
            outcome = call()
        except UserError as error:
            _broadcast(error)
            raise
        _broadcast(outcome)
    while isinstance(outcome, _Waiting):
        outcome = _broadcast(None)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def wait_on() -> None:
    """Keep the other ranks waiting in a long call of :func:`on_first_rank`, as collectives have time limits."""
    if torch.distributed.is_initialized():
        _broadcast(_Waiting())


class _Waiting:
    """Message of the first rank while its call is running."""


def _broadcast(message: object) -> object:
    messages = [message]
    torch.distributed.broadcast_object_list(messages, src=0)
    return messages[0]


def gathered[T](value: T) -> list[T] | None:
    """Values of all ranks, in their order, on the first rank; None on the others. Collective."""
    if not torch.distributed.is_initialized():
        return [value]
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    everywhere: list | None = [None] * size if rank == 0 else None
    torch.distributed.gather_object(value, everywhere, dst=0)
    return everywhere
