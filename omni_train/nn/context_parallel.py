"""Which tokens of a packed row each context-parallel rank holds, and which keys its queries see.

Each sequence is cut into 2·size pieces of equal length; rank r holds, sequence after sequence, piece r and then piece
2·size − 1 − r, so that all ranks have the same share of the causal attention's work. It is Megatron's own layout of
packed rows.

Axis letters: T tokens of the row, N sequences.
"""

from __future__ import annotations

import torch


def context_slice_indices(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Row positions that a rank holds, in its own order.

    Args:
        cu_seqlens: (N+1,) boundaries in the whole row.
        rank: this rank of the context-parallel group.
        size: of the group.

    Returns:
        (T/size,) int64.

    Raises:
        ValueError: a sequence whose length is not a multiple of 2·size.
    """
    starts, lengths, pieces = _pieces(cu_seqlens, rank, size)
    return _ranges(starts + pieces * lengths, lengths)


def context_restore_indices(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """Where each token of the row is when all ranks' parts are laid one after the other.

    Returns:
        (T,) int64: ``gathered[indices]`` is in the row's order.
    """
    return torch.cat([context_slice_indices(cu_seqlens, rank, size) for rank in range(size)]).argsort()


def context_key_indices(
    cu_seqlens: torch.Tensor, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keys of each of a rank's pieces: its sequence from the beginning to the end of the piece.

    Returns:
        row positions of the keys, piece after piece, (K,) int64; boundaries of the pieces in the rank's tokens,
        (2N+1,) int64; their boundaries in the keys, (2N+1,) int64. K is 1 + 1/(2·size) times the row.
    """
    starts, lengths, pieces = _pieces(cu_seqlens, rank, size)
    prefixes = (pieces + 1) * lengths
    return _ranges(starts, prefixes), _boundaries(lengths), _boundaries(prefixes)


def _pieces(cu_seqlens: torch.Tensor, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each piece a rank holds, (2N,): start of its sequence, length of the piece, number of the piece in it."""
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    if (lengths % (2 * size)).any():
        raise ValueError(f"context parallelism of {size} needs sequence lengths that are multiples of {2 * size}")
    pieces = torch.tensor([rank, 2 * size - 1 - rank], device=cu_seqlens.device).repeat(len(lengths))
    return cu_seqlens[:-1].repeat_interleave(2), (lengths // (2 * size)).repeat_interleave(2), pieces


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """start, start + 1, … start + length − 1 of each range, one range after the other."""
    ends = lengths.cumsum(0)
    shifts = (starts - ends + lengths).repeat_interleave(lengths)
    return shifts + torch.arange(len(shifts), device=shifts.device)


def _boundaries(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
