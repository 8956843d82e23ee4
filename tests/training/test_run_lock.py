"""All ranks hear whether the first one has the lock of their run, and whether it still has it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from unittest.mock import patch

import pytest
import torch

from omni_train import locks
from omni_train.errors import UserError
from omni_train.locks import DirectoryLock, Holder
from tests.support.thinker import small_recipe


def quicken() -> None:
    locks.HEARTBEAT_SECONDS, locks.POLL_SECONDS, locks.SILENT_POLLS = 0.02, 0.05, 20


def hold(rank, world_size, *directories):
    """What a rank is told: nothing, or why not; and what it is told when its lock is then taken from it."""
    from omni_train.training.run_lock import holding

    quicken()
    try:
        with holding(*directories, remedy="give another run=") as lock:
            lock.check()
            if rank == 0:
                (directories[0] / ".lock").unlink()
            lock.check()
    except UserError as error:
        return str(error)


def finish_between(rank, world_size, directory):
    """Two imports of one folder: the other ends when this one has looked and not yet taken the lock."""
    from omni_train.training.run_lock import holding

    def look():
        if (directory / "done").exists():
            raise UserError("there is something by now")

    look()
    torch.distributed.barrier()
    if rank == 0:
        directory.mkdir()
        (directory / "done").touch()
    with pytest.raises(UserError, match="something by now"), holding(directory, remedy="", when_held=look):
        pass


def test_what_came_in_before_the_lock_was_taken_is_seen_by_all_ranks(distributed, tmp_path):
    distributed(2, finish_between, tmp_path / "checkpoint")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["done"]


def left_by(directory, **changes):
    directory.mkdir()
    (directory / ".lock").write_text(json.dumps(asdict(replace(Holder.here(), **changes))) + "\n")


def test_a_lock_that_is_lost_is_noticed_by_all_ranks(distributed, tmp_path):
    first, second = distributed(2, hold, tmp_path)
    assert first == second
    assert ".lock was removed while process" in first


def test_a_refusal_arrives_on_all_ranks_and_of_several_directories_none_is_held(distributed, tmp_path):
    with DirectoryLock(tmp_path / "stage", remedy=""):
        first, second = distributed(2, hold, tmp_path / "pipeline", tmp_path / "stage")
    assert first == second
    assert first.startswith(f"{tmp_path}/stage: process ") and first.endswith("or give another run=")
    assert list(tmp_path.iterdir()) == []


def test_while_the_first_rank_watches_a_lock_of_another_machine_the_others_wait(distributed, tmp_path):
    left_by(tmp_path / "run", host="node7", kernel="another")
    start = time.monotonic()
    assert ["removed" in line for line in distributed(2, hold, tmp_path / "run")] == [True, True]
    assert time.monotonic() - start > 20 * 0.05


def save_into_anothers(rank, world_size, directory):
    """A run whose lock is lost between two checkpoints."""
    from omni_train.checkpoint.store import Store
    from omni_train.recipe.schema import CheckpointConfig
    from omni_train.training.run_lock import holding

    with holding(directory, remedy="") as lock:
        store = Store(directory / "checkpoints", CheckpointConfig())
        store.guard = lock.check
        if rank == 0:
            (directory / ".lock").unlink()
        with pytest.raises(UserError, match="was removed"):
            store._begin(1)
        store.guard = lambda: None
        paths = store._begin(1)
        store.guard = lock.check
        with pytest.raises(UserError, match="was removed"):
            store._complete(*paths, {})


def test_no_checkpoint_is_begun_or_completed_in_a_run_that_another_took_over(distributed, tmp_path):
    distributed(2, save_into_anothers, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001.partial"]


def run_stages(rank, world_size, folder):
    """The locks that are there while each stage of a pipeline trains."""
    from omni_train.recipe.pipeline import Pipeline
    from omni_train.training import pipeline

    stages = {name: small_recipe() for name in ("one", "two")}
    for name, recipe in stages.items():
        recipe.runs_dir, recipe.run = str(folder), f"p/{name}"
    found = []

    def train(recipe, lock):
        lock.check()
        found.append(sorted(str(path.relative_to(folder)) for path in folder.rglob(".lock")))
        return True

    with patch.object(pipeline, "train", train), patch.object(pipeline, "report"):
        assert pipeline.run_pipeline(Pipeline(folder / "p", stages)) == 0
    return found


def test_a_pipeline_holds_its_directory_and_those_of_all_its_stages(distributed, tmp_path):
    assert distributed(1, run_stages, tmp_path) == [[["p/.lock", "p/one/.lock", "p/two/.lock"]] * 2]
    assert not list(tmp_path.rglob(".lock"))
