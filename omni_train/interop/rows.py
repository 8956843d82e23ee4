"""Correspondence of tensors in two formats: each of ours is a concatenation of rows of theirs.

A row runs along a tensor's last axis: a matrix (R, H) has R rows, a vector has rows of one number, and stacked experts
(E, R, H) are E·R rows, expert after expert. A convolution of four or more axes has a row for each output channel.
Everything that the formats do differently, fused projections, interleaved heads, stacked experts, is a choice and an
order of rows; one list of them serves both directions, and any part of a tensor can be found without the rest of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from omni_train.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of the tensor `name` in the other format; without `stop`, all of them."""

    name: str
    start: int = 0
    stop: int | None = None


TensorMap = dict[str, list[Rows]]
"""Our tensor's name in a checkpoint -> the rows that it is concatenated from; none where it has no counterpart."""


def row_count(shape: Sequence[int]) -> int:
    """Number of rows of a tensor of this shape."""
    return prod(shape[:-1]) if len(shape) in (2, 3) else shape[0]


def row_size(shape: Sequence[int]) -> int:
    """Number of elements in a row of a tensor of this shape."""
    return prod(shape) // row_count(shape)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """View of a tensor as (rows, row size)."""
    return tensor.view(row_count(tensor.shape), -1)


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of one of our tensors, which are those of the tensor `name` from row `source` on."""

    start: int
    stop: int
    name: str
    source: int


def spans(ours: str, shape: Sequence[int], parts: list[Rows]) -> list[Span]:
    """Spans of the rows of one of our tensors.

    Args:
        ours: its name.
        shape: its shape.
        parts: the rows that it is concatenated from.

    Raises:
        UserError: the parts do not add up to the tensor.
    """
    rows, end, out = row_count(shape), 0, []
    for part in parts:
        length = rows if part.stop is None else part.stop - part.start
        out.append(Span(end, end + length, part.name, part.start))
        end += length
    if parts and end != rows:
        raise UserError(f"{ours}: must have {rows} rows, but {', '.join(p.name for p in parts[:3])} … give {end}")
    return out


def overlaps(all_spans: list[Span], start: int, stop: int) -> Iterator[tuple[slice, str, int]]:
    """Sources of rows `start` to `stop` of one of our tensors.

    Yields:
        slice of those rows, counted from `start`, and the name and first row of the tensor that it equals.
    """
    first = bisect_right(all_spans, start, key=lambda span: span.start) - 1
    for span in all_spans[max(first, 0) :]:
        low, high = max(start, span.start), min(stop, span.stop)
        if span.start >= stop:
            return
        if low < high:
            yield slice(low - start, high - start), span.name, span.source + low - span.start


def boxes(data: torch.Tensor, offset: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[torch.Tensor, int, slice]]:
    """Pieces of a rank's part of a tensor, each of consecutive rows of the whole.

    Args:
        data: the rank's part.
        offset: indices of its first element in the whole tensor.
        shape: shape of the whole tensor.

    Yields:
        (rows, columns) views of `data`, the first row of each in the whole tensor, and its columns.
    """
    if data.ndim not in (2, 3):
        yield as_rows(data), offset[0], slice(None)
        return
    columns = slice(offset[-1], offset[-1] + data.shape[-1])
    if data.ndim == 2 or data.shape[1:-1] == tuple(shape[1:-1]):
        yield as_rows(data), offset[0] * prod(shape[1:-1]), columns
        return
    for expert, part in enumerate(data, start=offset[0]):
        yield part, expert * shape[1] + offset[1], columns
