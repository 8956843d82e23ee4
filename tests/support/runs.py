"""Whole runs of the trainer on rows from memory, within a rank of the pool: saved, stopped, resumed."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from omni_train.errors import UserError
from omni_train.recipe.schema import EngineName, Precision, ZeroConfig
from tests.support.thinker import global_batches, small_recipe

TINY = dict(pattern="GE*E", vocab_size=112)


@dataclass
class Outcome:
    """How a run went on one rank."""

    losses: list[tuple]  # step, loss and gradient norm of every line of metrics.jsonl
    said: str  # on standard error
    error: str | None  # message of what ended the run, None where it finished
    status: int  # that the command line would exit with
    threads: list[str]  # that outlive the run

    @property
    def whole(self) -> bool:
        return self.error is None


class RowsFromMemory:
    """In the place of the feed: the same global batches for every run."""

    def __init__(self, recipe) -> None:
        from omni_train import platform
        from tests.training.engines.test_zero import batches

        self.position, self.wait_seconds = 0, 0.0
        self.rank, self.world = platform.parallel.data_rank(), platform.parallel.data_world_size()
        self.batches = batches(12) if recipe.engine is EngineName.deepspeed else global_batches(12)

    def rows(self, count: int) -> list:
        rows = self.batches[self.position]
        self.position += 1
        share = len(rows) // self.world
        return rows[self.rank * share : (self.rank + 1) * share]

    def state(self) -> dict:
        return {"world_size": self.world, "position": self.position}

    def restore(self, states: list) -> None:
        self.position = states[self.rank]["position"]

    def start(self) -> None:
        """They are there."""

    def close(self) -> None:
        """Nothing is open."""


def recipe_of(folder: Path, engine: str = "megatron", **changes):
    """A recipe of a tiny network on either engine; `changes` by dotted key, with a dot as two underscores."""
    if engine == "megatron":
        recipe = small_recipe(**TINY)
    else:
        from tests.training.engines import test_zero

        recipe = test_zero.recipe_of(ZeroConfig(stage=2, whole_below=10), Precision.fp32)
    recipe.runs_dir, recipe.run = str(folder.parent), folder.name
    recipe.schedule.steps, recipe.checkpoint.save_every, recipe.checkpoint.keep = 6, 2, 0
    recipe.tracking.expert_load_every, recipe.data.workers = 0, 0
    for key, value in changes.items():
        *rooms, name = key.split("__")
        room = recipe
        for one in rooms:
            room = getattr(room, one)
        setattr(room, name, value)
    return recipe


@contextlib.contextmanager
def prepared(engine: str):
    """The trainer with rows from memory."""
    from omni_train.training import trainer

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(trainer, "Feed", RowsFromMemory))
        stack.enter_context(patch.object(trainer, "SECONDS_BETWEEN_SAVES", 0.0))
        yield


def run(
    rank, world_size, folder, engine="megatron", fault: Callable | None = None, changes: dict | None = None
) -> Outcome:
    """A run on this rank of the pool, to its end.

    Args:
        fault: called with the trainer and this rank before it begins, to make something fail.
        changes: of the recipe, as :func:`recipe_of` takes them.
    """
    from omni_train import platform
    from omni_train.training import trainer

    folder = Path(folder)
    recipe = recipe_of(folder, engine, **(changes or {}))
    error, before = None, set(threading.enumerate())
    with tempfile.TemporaryFile("w+") as file, contextlib.redirect_stderr(file), prepared(engine):
        platform.parallel.initialize(recipe.parallel, recipe.seed)
        try:
            one = trainer.Trainer(recipe)
            with contextlib.nullcontext() if fault is None else fault(one, rank):
                one.fit()
        except (UserError, ArithmeticError) as caught:
            error = caught
        file.seek(0)
        said = file.read()
    threads = [thread.name for thread in set(threading.enumerate()) - before if "checkpoint" in thread.name]
    platform.parallel.destroy()
    status = 0 if error is None else getattr(error, "status", 1)
    return Outcome(logged(folder), said, str(error) if error else None, status, threads)


def logged(folder: Path) -> list[tuple]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(one["step"], one["loss"], one["grad_norm"]) for one in map(json.loads, lines)]
