"""Exchange that assembles whole matrices from the shards of data and tensor ranks, and scatters results back.

The distributed optimizer cuts its buffers into equal shares, one for each data rank, and tensor parallelism cuts the
matrices before that. As in Distributed Muon (Moonlight, arXiv:2502.16982, section 2.3) a matrix is made whole for the
moment that needs it: it has an owner among the ranks that hold some of it, to which the others send theirs, and which
sends each its own of the result. All ranks work at once, on different matrices; what lies on one rank stays there.

Names: a matrix is one linear map, of one expert where they are stacked; a tile is a parameter, which may hold several;
a piece is a run of numbers of a matrix in a tile on one rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from omni_train import platform

_BATCH_NUMEL = 1 << 26  # numbers that an owner works on at once: a quarter of a gigabyte, several times over


@dataclass(frozen=True)
class Tile:
    """A parameter as every tensor rank holds one, sharded over the data ranks.

    Args:
        shape: (…, rows, columns) of the parameter on a tensor rank.
        rows: rows of each linear map in it, see :data:`omni_train.nn.matrices.FusedRows`.
        split: axis of the matrix that tensor ranks divide, 0 for rows or 1 for columns; None where each has all.
        start: offset of the parameter in its bucket, in numbers.
        share: numbers of the bucket that each data rank holds.
    """

    shape: torch.Size
    rows: tuple[int, ...]
    split: int | None
    start: int
    share: int


@dataclass(frozen=True)
class _Piece:
    rank: int  # in the exchange's group
    tile: int
    start: int  # in the tile, flat
    numel: int


@dataclass
class _Matrix:
    shape: tuple[int, int]
    parts: int  # side by side, where tensor ranks divide the columns; 1 otherwise
    copies: list[list[_Piece]]  # one; where every tensor rank has the whole matrix, one of each
    owner: int = 0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


class Exchange:
    """Exchange that applies a function of whole matrices to tensors sharded over ranks.

    Args:
        tiles: parameters, the same on every rank of the group and in the same order.
        group: process group of all tensor ranks of all data ranks that share the tiles.
        places: (tensor rank, data rank) of each rank of the group.
    """

    def __init__(self, tiles: list[Tile], group: torch.distributed.ProcessGroup, places: list[tuple[int, int]]) -> None:
        self.group, self.rank = group, group.rank()
        self._data_rank, self._tiles = places[self.rank][1], tiles
        ranks = {place: rank for rank, place in enumerate(places)}
        matrices = [matrix for index, tile in enumerate(tiles) for matrix in _matrices(index, tile, ranks)]
        _choose_owners(matrices, len(places))
        self._batches = [_Batch(batch, self.rank, len(places)) for batch in _in_batches(matrices)]

    def apply(self, shards: dict[int, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        """Replace the matrices by a function of them. Collective.

        Args:
            shards: index of a tile -> this rank's shard of it, flat, for every tile that it holds any of.
            function: (matrices, rows, columns) -> the same shape, each matrix by itself.
        """
        for batch in self._batches:
            self._apply(batch, shards, function)

    def _apply(self, batch: _Batch, shards: dict[int, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        mine = [self._view(shards, piece) for piece in batch.outgoing]
        received = self._all_to_all(mine, batch.sent, batch.received, next(iter(shards.values()), None))
        for matrices in batch.alike:
            stack = torch.stack([_assembled(matrix, received, batch.offsets) for matrix in matrices])
            for matrix, result in zip(matrices, function(stack), strict=True):
                _scatter(matrix, result, received, batch.offsets)
        returned = self._all_to_all([received], batch.received, batch.sent, received)
        for view, part in zip(mine, returned.split([view.numel() for view in mine]), strict=True):
            view.copy_(part)

    def _view(self, shards: dict[int, Tensor], piece: _Piece) -> Tensor:
        tile = self._tiles[piece.tile]
        first = max(0, self._data_rank * tile.share - tile.start)  # first of the tile's numbers on this rank
        return shards[piece.tile].narrow(0, piece.start - first, piece.numel)

    def _all_to_all(self, tensors: list[Tensor], sent: list[int], received: list[int], like: Tensor | None) -> Tensor:
        if not tensors:
            device = platform.device() if like is None else like.device
            tensors = [torch.empty(0, dtype=torch.float32, device=device)]
        flat = torch.cat(tensors)
        if self.group.size() == 1:
            return flat
        out = flat.new_empty(sum(received))
        torch.distributed.all_to_all_single(out, flat, received, sent, group=self.group)
        return out


@dataclass
class _Batch:
    """Matrices and pieces of one round of the exchange, in the same order on the sending and the receiving rank."""

    matrices: list[_Matrix]
    rank: int
    size: int
    outgoing: list[_Piece] = field(init=False)  # this rank's, in the order in which they are sent
    sent: list[int] = field(init=False)  # numbers to each rank
    received: list[int] = field(init=False)  # numbers from each rank
    offsets: dict[_Piece, int] = field(init=False)  # of each piece of this rank's matrices, in what is received
    alike: list[list[_Matrix]] = field(init=False)  # this rank's, of equal shape

    def __post_init__(self) -> None:
        to: defaultdict[int, list[_Piece]] = defaultdict(list)
        coming: defaultdict[int, list[_Piece]] = defaultdict(list)
        groups: defaultdict[tuple[int, int], list[_Matrix]] = defaultdict(list)
        for matrix in self.matrices:
            for piece in (piece for copy in matrix.copies for piece in copy):
                if piece.rank == self.rank:
                    to[matrix.owner].append(piece)
                if matrix.owner == self.rank:
                    coming[piece.rank].append(piece)
            if matrix.owner == self.rank:
                groups[matrix.shape].append(matrix)
        self.outgoing = [piece for rank in range(self.size) for piece in to[rank]]
        self.sent = [sum(piece.numel for piece in to[rank]) for rank in range(self.size)]
        self.received = [sum(piece.numel for piece in coming[rank]) for rank in range(self.size)]
        order = [piece for rank in range(self.size) for piece in coming[rank]]
        starts = accumulate((piece.numel for piece in order), initial=0)
        self.offsets = dict(zip(order, starts, strict=False))
        self.alike = list(groups.values())


def _matrices(index: int, tile: Tile, ranks: dict[tuple[int, int], int]) -> Iterable[_Matrix]:
    rows, columns = tile.shape[-2:]
    tensor_ranks = 1 + max(tensor for tensor, _ in ranks)
    for stacked in range(tile.shape[:-2].numel()):
        for part in range(len(tile.rows)):
            copies: list[list[_Piece]] = []
            height = 0
            for tensor in range(tensor_ranks):
                pieces: list[_Piece] = []
                for first, last in _runs(tile, part, tensor if tile.split == 0 else 0):
                    start, stop = ((stacked * rows + row) * columns for row in (first, last))
                    pieces += _cut(index, tile, start, stop, tensor, ranks)
                    height += last - first
                copies.append(pieces)
            joined = [piece for pieces in copies for piece in pieces]
            if tile.split is None:
                yield _Matrix((height // tensor_ranks, columns), 1, copies)
            elif tile.split == 0:
                yield _Matrix((height, columns), 1, [joined])
            else:
                shape = (height // tensor_ranks, columns * tensor_ranks)
                yield _Matrix(shape, tensor_ranks, [joined])


def _runs(tile: Tile, part: int, tensor: int) -> Iterable[tuple[int, int]]:
    """(start, stop) of the rows of a linear map on a tensor rank, whose rows follow those of the ranks before it."""
    rows, period = tile.shape[-2], sum(tile.rows)
    before, height, first = sum(tile.rows[:part]), tile.rows[part], tensor * rows
    for repeat in range(first // period, -(-(first + rows) // period)):
        start, stop = (max(0, min(rows, repeat * period + row - first)) for row in (before, before + height))
        if start < stop:
            yield start, stop


def _cut(
    index: int, tile: Tile, start: int, stop: int, tensor: int, ranks: dict[tuple[int, int], int]
) -> Iterable[_Piece]:
    """Pieces of a tile's numbers from `start` to `stop`, one for each data rank that holds any."""
    while start < stop:
        data = (tile.start + start) // tile.share
        end = min(stop, (data + 1) * tile.share - tile.start)
        yield _Piece(ranks[tensor, data], index, start, end - start)
        start = end


def _choose_owners(matrices: list[_Matrix], size: int) -> None:
    """Set each matrix's owner: the rank that holds most of it; of several, the one with the least work so far."""
    work = [0] * size
    for matrix in matrices:
        held: defaultdict[int, int] = defaultdict(int)
        for piece in (piece for copy in matrix.copies for piece in copy):
            held[piece.rank] += piece.numel
        matrix.owner = min(held, key=lambda rank: (-held[rank], work[rank], rank))
        work[matrix.owner] += matrix.numel * min(matrix.shape)


def _in_batches(matrices: list[_Matrix]) -> list[list[_Matrix]]:
    """Matrices in batches, of each owner as many as fit: all owners work in every batch, as long as they have work."""
    batches: list[list[_Matrix]] = []
    filled: defaultdict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # of each owner its batch, how full that is
    for matrix in matrices:
        batch, full = filled[matrix.owner]
        if full and full + matrix.numel > _BATCH_NUMEL:
            batch, full = batch + 1, 0
        filled[matrix.owner] = batch, full + matrix.numel
        while len(batches) <= batch:
            batches.append([])
        batches[batch].append(matrix)
    return batches


def _assembled(matrix: _Matrix, received: Tensor, offsets: dict[_Piece, int]) -> Tensor:
    flat = torch.cat([received.narrow(0, offsets[piece], piece.numel) for piece in matrix.copies[0]])
    if matrix.parts == 1:
        return flat.view(matrix.shape)
    return flat.view(matrix.parts, matrix.shape[0], -1).transpose(0, 1).reshape(matrix.shape)


def _scatter(matrix: _Matrix, result: Tensor, received: Tensor, offsets: dict[_Piece, int]) -> None:
    if matrix.parts > 1:
        result = result.view(matrix.shape[0], matrix.parts, -1).transpose(0, 1)
    flat = result.reshape(-1)
    for pieces in matrix.copies:
        start = 0
        for piece in pieces:
            received.narrow(0, offsets[piece], piece.numel).copy_(flat.narrow(0, start, piece.numel))
            start += piece.numel
