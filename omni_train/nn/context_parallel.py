"""Context parallelism of packed rows: tokens of each rank, keys of its queries, and its share of the media.

Each sequence is cut into 2·size pieces of equal length; rank r holds, sequence after sequence, piece r and then piece
2·size − 1 − r, so that causal attention costs all ranks the same. It is Megatron's own layout of packed rows.

Axis letters: T tokens of the row, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed import ProcessGroup


def context_slice_indices(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Indices of the row's tokens that a rank holds, in the rank's order.

    Args:
        cu_seqlens: (N+1,) boundaries in the whole row.
        rank: rank in the context-parallel group.
        size: size of the group.

    Returns:
        (T/size,) int64.

    Raises:
        ValueError: a sequence whose length is not a multiple of 2·size.
    """
    starts, lengths, pieces = _pieces(cu_seqlens, rank, size)
    return _ranges(starts + pieces * lengths, lengths)


def context_restore_indices(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """Indices that restore the row's order of tokens gathered rank after rank.

    Args:
        cu_seqlens: (N+1,) boundaries in the whole row.
        size: size of the context-parallel group.

    Returns:
        (T,) int64: ``gathered[indices]`` is in the row's order.

    Raises:
        ValueError: a sequence whose length is not a multiple of 2·size.
    """
    return torch.cat([context_slice_indices(cu_seqlens, rank, size) for rank in range(size)]).argsort()


def context_key_indices(
    cu_seqlens: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of the keys of each of a rank's pieces: its sequence from the beginning to the end of the piece.

    Args:
        cu_seqlens: (N+1,) boundaries in the whole row.
        rank: rank in the context-parallel group.
        size: size of the group.

    Returns:
        indices of the keys in the row, piece after piece, (K,) int64; boundaries of the pieces in the rank's tokens,
        (2N+1,) int64; their boundaries in the keys, (2N+1,) int64. K is 1 + 1/(2·size) times the row.

    Raises:
        ValueError: a sequence whose length is not a multiple of 2·size.
    """
    starts, lengths, pieces = _pieces(cu_seqlens, rank, size)
    prefixes = (pieces + 1) * lengths
    return _ranges(starts, prefixes), _boundaries(lengths), _boundaries(prefixes)


def _pieces(cu_seqlens: torch.Tensor, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start of the sequence, length, and number in the sequence of each piece a rank holds, (2N,) each."""
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    if (lengths % (2 * size)).any():
        raise ValueError(f"context parallelism of {size} needs sequence lengths that are multiples of {2 * size}")
    pieces = torch.tensor([rank, 2 * size - 1 - rank], device=cu_seqlens.device).repeat(len(lengths))
    return cu_seqlens[:-1].repeat_interleave(2), (lengths // (2 * size)).repeat_interleave(2), pieces


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Concatenation of the ranges from each start, of each length."""
    ends = lengths.cumsum(0)
    shifts = (starts - ends + lengths).repeat_interleave(lengths)
    return shifts + torch.arange(len(shifts), device=shifts.device)


def _boundaries(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def share_evenly(costs: Sequence[int], outputs: Sequence[int], group: ProcessGroup) -> tuple[slice, list[int]]:
    """Consecutive pieces of work for this rank, so that all ranks have about the same cost.

    Args:
        costs: cost of each piece, in any unit.
        outputs: output tokens of each piece.
        group: the ranks that share the pieces.

    Returns:
        slice of this rank's pieces, and the output tokens of each rank.
    """
    size, total = group.size(), sum(costs)
    ends, done = [0] * size, 0
    for index, cost in enumerate(costs):
        owner = min(size - 1, int((done + cost / 2) * size / total)) if total else 0
        ends[owner] = index + 1
        done += cost
    for rank in range(1, size):
        ends[rank] = max(ends[rank], ends[rank - 1])
    bounds = [0, *ends]
    counts = [sum(outputs[bounds[rank] : bounds[rank + 1]]) for rank in range(size)]
    return slice(bounds[group.rank()], bounds[group.rank() + 1]), counts


def gather_shares(made: torch.Tensor, counts: Sequence[int], group: ProcessGroup) -> torch.Tensor:
    """Tokens of all ranks, rank after rank; their gradients are summed over the ranks, and go to the rank they are of.

    Args:
        made: (at least counts[rank], H) this rank's tokens; those beyond its count are dropped, with gradient zero.
        counts: tokens of each rank.
        group: the ranks.

    Returns:
        (sum of counts, H).
    """
    return _GatherShares.apply(made, counts, group) if group.size() > 1 else made[: counts[0]]


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, made, counts, group):
        ctx.counts, ctx.group, ctx.shape = counts, group, made.shape
        rank, longest = group.rank(), max(counts)
        padded = made.new_zeros(longest, *made.shape[1:])
        padded[: counts[rank]] = made[: counts[rank]]
        gathered = made.new_empty(longest * group.size(), *made.shape[1:])
        if longest:
            torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[r * longest : r * longest + count] for r, count in enumerate(counts)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        if len(gradient):
            torch.distributed.all_reduce(gradient, group=ctx.group)
        rank = ctx.group.rank()
        start = sum(ctx.counts[:rank])
        mine = gradient.new_zeros(ctx.shape)
        mine[: ctx.counts[rank]] = gradient[start : start + ctx.counts[rank]]
        return mine, None, None
