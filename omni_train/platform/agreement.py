"""What the ranks agree on before they go on together, so that none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable

import torch

from omni_train.errors import UserError
from omni_train.platform.device import device


def agree(problem: str | None) -> str | None:
    """The problem of the first rank that has one, on all ranks; None where none has. Collective."""
    if not torch.distributed.is_initialized():
        return problem
    if not anywhere(problem is not None):
        return None
    problems: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    return next(filter(None, problems))


def anywhere(value: bool) -> bool:
    """Whether it is so on any rank. Collective."""
    if not torch.distributed.is_initialized():
        return value
    flag = torch.tensor(float(value), device=device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def on_first_rank[T](call: Callable[[], T]) -> T:
    """What a call returns on the first rank, on all ranks; a ``UserError`` of it, likewise. Collective."""
    if not torch.distributed.is_initialized():
        return call()
    answer: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [call(), None]
        except UserError as error:
            answer = [None, error]
    torch.distributed.broadcast_object_list(answer, src=0)
    result, error = answer
    if error is not None:
        raise error
    return result


def gathered[T](value: T) -> list[T] | None:
    """The values of all ranks, in their order, on the first; None on the others. Collective."""
    if not torch.distributed.is_initialized():
        return [value]
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    everywhere: list | None = [None] * size if rank == 0 else None
    torch.distributed.gather_object(value, everywhere, dst=0)
    return everywhere
