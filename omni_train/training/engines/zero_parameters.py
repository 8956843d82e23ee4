"""Parameters of networks that ZeRO shards: their names, and the part of them that each rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch


def named_parameters(networks: Mapping[str, torch.nn.Module], alone: bool | None = None) -> Iterator:
    """(name, parameter) pairs as recipes match them, prefixed by the network's name where there are several networks.

    Args:
        networks: networks by name.
        alone: whether names have no prefix; None where that depends on the number of networks.
    """
    alone = len(networks) == 1 if alone is None else alone
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            yield (key if alone else f"{name}.{key}"), parameter


def shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Part of a parameter that this rank holds between steps: a flat shard at ZeRO stage 3, else the whole."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part.data


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def share_of(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """Part of a whole tensor that this rank holds, cut as :func:`shard` of the parameter is."""
    mine = shard(parameter)
    if mine is parameter.data or mine.shape == whole.shape:
        return whole
    start = torch.distributed.get_rank() * mine.numel()
    part = whole.flatten()[start : start + mine.numel()]
    return torch.nn.functional.pad(part, (0, mine.numel() - part.numel()))


def whole(parameter: torch.nn.Parameter, mine: torch.Tensor) -> torch.Tensor:
    """Whole parameter, or its average, gathered from the shards of all ranks. Collective at ZeRO stage 3.

    Args:
        parameter: the parameter, for its shape.
        mine: this rank's part, of the parameter or its average, as :func:`shard` returns it.
    """
    if not hasattr(parameter, "ds_tensor"):
        return mine.detach().clone()
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, mine.detach())
    shape = full_shape(parameter)
    return torch.cat(parts)[: shape.numel()].view(shape)
