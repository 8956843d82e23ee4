"""Rows for every rank: one rank of each model group reads them, the others receive them."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypedDict

from omni_train import platform
from omni_train.data.rows.base import Row
from omni_train.data.rows.kinds import kind_of
from omni_train.data.rows.questions import answer_rows
from omni_train.data.rows.stored_states import check_states
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.loader import Loader, build_loader, evaluation_rows
from omni_train.data.stream.states import redistribute
from omni_train.data.workers import start_server
from omni_train.errors import UserError
from omni_train.platform.logs import warn
from omni_train.recipe.schema import Recipe, States
from omni_train.training.model_group import ModelGroup


class Feed:
    """Rows of this data rank, the same on all ranks of its model group.

    Args:
        recipe: a validated recipe.

    Raises:
        UserError: on every rank of the group, whatever stopped the reading rank: missing shards, too many samples
            skipped, a tokenizer with more tokens than the model has embeddings.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.kind = recipe, kind_of(recipe.data.rows)
        self.group = ModelGroup()
        self.wait_seconds = 0.0  # that the last call of `rows` took
        self.loader: Loader | None = None
        self._iterator: Iterator[Row] = iter(())
        self.group.share(self._open)

    def _open(self) -> None:
        data, vocab = self.recipe.data, self.recipe.model.vocab_size
        size = Tokenizer(data.tokenizer).size
        if size > vocab:
            raise UserError(f"data.tokenizer={data.tokenizer} has {size} tokens, more than model.vocab_size={vocab}")
        if told := self.kind.warning(data):
            warn(told)
        if data.codec is not None:
            from omni_train.frozen.codec import codec_hash

            self.recipe = replace(self.recipe, data=replace(data, codec=codec_hash(data.codec)))
            data = self.recipe.data
        if data.rows == "speech" and data.speech.states is States.stored:
            from omni_train.frozen.thinker_hash import stored_thinker

            check_states(self.recipe, stored_thinker(self.recipe))
        self.loader = build_loader(data, self.recipe.model, split="train", seed=self.recipe.seed, **_my_part())
        self._iterator = iter(self.loader)

    def start(self) -> None:
        """Wait for the first row, which may take minutes: the loader's workers begin to read and fill their buffers."""

        def look_ahead() -> None:
            self._iterator = itertools.chain([next(self._iterator)], self._iterator)

        self.group.share(look_ahead)

    def rows(self, count: int) -> list[Row]:
        """The next `count` rows of training."""
        start = time.perf_counter()
        rows = self.group.share_rows(lambda: [next(self._iterator) for _ in range(count)])
        self.wait_seconds = time.perf_counter() - start
        return rows

    def held_out(self, count: int) -> list[Row]:
        """This data rank's part of `count` held-out rows, the same ones at every call."""
        return self.group.share_rows(
            lambda: evaluation_rows(self.recipe.data, self.recipe.model, rows=count, **_my_part())
        )

    def questions(self) -> tuple[list[Any], Counter[str]]:
        """This data rank's held-out data for the evaluation, the same at every call.

        Returns:
            the data as the recipe's kind of row reads them, and how many samples could not be read, by reason.
        """
        data, model, evaluation = self.recipe.data, self.recipe.model, self.recipe.evaluation

        def read() -> tuple[list[Any], Counter[str]]:
            refused: Counter[str] = Counter()
            return self.kind.held_out(data, model, evaluation, refused=refused, **_my_part()), refused

        return self.group.share(read)

    def answers(self, swapped: bool) -> list[Row]:
        """This data rank's rows of the held-out chats with media, with their own media or with those of other chats."""
        recipe = self.recipe
        return self.group.share_rows(
            lambda: answer_rows(recipe.data, recipe.model, recipe.evaluation, swapped=swapped, **_my_part())
        )

    def state(self) -> Any:
        """State of the loader on the reading rank, for checkpoints; None elsewhere."""
        return self.loader.state_dict() if self.loader is not None else None

    def restore(self, states: list) -> None:
        """Continue where the data ranks that wrote `states` stopped, whatever their number."""

        def load() -> None:
            world = platform.parallel.data_world_size()
            assert self.loader is not None
            mine = states if len(states) == world else redistribute(states, world)
            self.loader.load_state_dict(mine[platform.parallel.data_rank()])
            self._iterator = iter(self.loader)

        self.group.share(load)

    def close(self) -> None:
        """End the loader's workers."""
        if self.loader is not None:
            self.loader.close()


def prepare(recipe: Recipe) -> None:
    """Start the server that loader workers are forked from, on ranks that read: it is ready when the model is built."""
    if recipe.data.workers and ModelGroup().reads:
        start_server()


class _Part(TypedDict):
    data_rank: int
    data_world_size: int


def _my_part() -> _Part:
    return {"data_rank": platform.parallel.data_rank(), "data_world_size": platform.parallel.data_world_size()}
