"""Rows for every rank: one rank of each model group reads them, the others receive them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from omni_train import platform
from omni_train.data.batch import PackedBatch
from omni_train.errors import UserError


class Feed:
    """The rows of this data rank, the same on all ranks of its model group.

    Args:
        build: makes the loader; called on the reading rank only.
    """

    def __init__(self, build) -> None:
        self.group = platform.parallel.model_group()
        self.source = torch.distributed.get_global_rank(self.group, 0)
        self.reads = platform.rank() == self.source
        self.wait_seconds = 0.0  # spent waiting for data since the last call of `rows`
        self.loader = self._together(build)
        self._iterator: Iterator[PackedBatch] | None = None

    def _together(self, action):
        """Run `action` on the reading rank; every rank of the group raises what it raises."""
        result, error = None, None
        if self.reads:
            try:
                result = action()
            except UserError as problem:
                error = problem
        errors = [error]
        torch.distributed.broadcast_object_list(errors, src=self.source, group=self.group)
        if errors[0] is not None:
            raise errors[0]
        return result

    def rows(self, count: int) -> list[PackedBatch]:
        """The next `count` rows.

        Raises:
            UserError: the loader refused to go on (too much was skipped, nothing could be read).
        """
        start = time.perf_counter()

        def read():
            if self._iterator is None:
                self._iterator = iter(self.loader)
            return [next(self._iterator) for _ in range(count)]

        message = [None]
        problem = None
        if self.reads:
            try:
                message = [read()]
            except UserError as error:
                message, problem = [error], error
        torch.distributed.broadcast_object_list(message, src=self.source, group=self.group)
        self.wait_seconds = time.perf_counter() - start
        if isinstance(message[0], UserError):
            raise problem or message[0]
        return message[0]

    def state(self):
        """State of the loader on the reading rank, None elsewhere."""
        return self.loader.state_dict() if self.reads else None

    def restore(self, states: list) -> None:
        """Continue where the data ranks that wrote `states` stopped, on as many ranks or on another number."""
        world = platform.parallel.data_world_size()

        def load():
            from omni_train.data.loader import redistribute

            mine = states if len(states) == world else redistribute(states, world)
            self.loader.load_state_dict(mine[platform.parallel.data_rank()])

        self._together(load)
