"""Parameters of networks in ZeRO's hands: their names, and what each rank has of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def named_parameters(networks: dict[str, torch.nn.Module], alone: bool | None = None) -> Iterator:
    """(name, parameter) as recipes match them: a lone network's own names, else behind the network's name and a dot."""
    alone = len(networks) == 1 if alone is None else alone
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            yield (key if alone else f"{name}.{key}"), parameter


def shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter between steps: a part of it at ZeRO's stage 3, else all."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part.data


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def share_of(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, as :func:`shard` has it."""
    mine = shard(parameter)
    if mine is parameter.data or mine.shape == whole.shape:
        return whole
    start = torch.distributed.get_rank() * mine.numel()
    part = whole.flatten()[start : start + mine.numel()]
    return torch.nn.functional.pad(part, (0, mine.numel() - part.numel()))


def whole(parameter: torch.nn.Parameter, mine: torch.Tensor) -> torch.Tensor:
    """A parameter, or its average, from what each rank has of it as :func:`shard` says. Collective at stage 3."""
    if not hasattr(parameter, "ds_tensor"):
        return mine.detach().clone()
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, mine.detach())
    shape = full_shape(parameter)
    return torch.cat(parts)[: shape.numel()].view(shape)
