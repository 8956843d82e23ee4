"""The ranks that work on the same rows: one of them reads, the others receive what it has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from omni_train import platform
from omni_train.data.rows.base import Row
from omni_train.errors import UserError


class ModelGroup:
    """The model group of this rank. Process groups must exist.

    Attributes:
        reads: whether this rank is the one that reads.
    """

    def __init__(self) -> None:
        self.group = platform.parallel.model_group()
        self.source = torch.distributed.get_global_rank(self.group, 0)
        self.reads = platform.rank() == self.source
        self.media_group = platform.parallel.first_stage_group()  # whose first rank reads

    def share[Found](self, read: Callable[[], Found]) -> Found:
        """Result of `read` on the reading rank, on every rank of the group; what it raises, likewise."""
        if self.group.size() == 1:
            return read()
        message: list = [None]
        problem: UserError | None = None
        if self.reads:
            try:
                message = [read()]
            except UserError as error:
                message, problem = [error], error
        torch.distributed.broadcast_object_list(message, src=self.source, group=self.group)
        if isinstance(message[0], UserError):
            raise problem or message[0]
        return message[0]

    def share_rows(self, read: Callable[[], Sequence[Row]]) -> list[Row]:
        """Rows on every rank of the group, with their media on the first pipeline stage only, sent as tensors."""
        if self.group.size() == 1:
            return list(read())
        read_rows: list[Row] = []

        def without_media() -> list[tuple[Row, dict]]:
            read_rows[:] = read()
            return [
                (row.without_media(), {name: _described(getattr(row, name)) for name in row.MEDIA}) for row in read_rows
            ]

        shared = self.share(without_media)
        if self.media_group is None:
            return [row for row, _ in shared]
        rows = []
        for index, (row, media) in enumerate(shared):
            source = read_rows[index] if self.reads else None
            rows.append(replace(row, **{name: self._share_tensor(source, name, *media[name]) for name in media}))
        return rows

    def _share_tensor(self, row: Row | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        assert self.media_group is not None
        if self.media_group.size() == 1:
            return getattr(row, name)
        tensor = torch.empty(shape, dtype=dtype) if row is None else getattr(row, name)
        if tensor.numel():
            tensor = tensor.to(platform.device())
            torch.distributed.broadcast(tensor, src=self.source, group=self.media_group)
        return tensor.cpu()  # the rows of all micro-batches wait there


def _described(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
