"""A save that fails costs a line; the run goes on, and only too many in a row, or the last, end it."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing.process
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from omni_train import platform
from tests.support.runs import logged, run

ENGINES = ("megatron", "deepspeed")


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_????????"))


@contextlib.contextmanager
def small_files_only():
    """No file may have more than 2 kB: writes beyond end in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_folders():
    """None can be made."""
    make = Path.mkdir

    def refuse(path, *args, **options):
        if path.name.endswith(".partial"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        make(path, *args, **options)

    with patch.object(Path, "mkdir", refuse):
        yield


@contextlib.contextmanager
def no_end():
    """All can be written but the last file."""

    def refuse(checkpoint, known=None):
        raise OSError(errno.ENOSPC, "No space left on device", str(checkpoint))

    with patch("omni_train.checkpoint.store.write_digests", refuse):
        yield


@contextlib.contextmanager
def failing(trainer, rank, *, trouble, at: dict[int, int], on: int = 0):
    """The first `at[step]` saves of a step fail on one rank."""
    save, left = trainer._save, dict(at)

    def save_in_trouble() -> None:
        troubled = left.get(trainer.step, 0) > 0
        left[trainer.step] = left.get(trainer.step, 0) - 1
        with trouble() if troubled and rank == on else contextlib.nullcontext():
            save()
            trainer.store.finish(blocking=True)

    with patch.object(trainer, "_save", save_in_trouble):
        yield


def fails(trouble, at: dict[int, int], on: int = 0):
    return functools.partial(failing, trouble=trouble, at=at, on=on)


@pytest.mark.parametrize(
    ("engine", "trouble", "on", "reason"),
    [
        ("megatron", small_files_only, 1, "rank 1: "),
        ("megatron", no_folders, 0, "Read-only file system"),
        ("megatron", no_end, 0, "No space left on device"),
        ("deepspeed", small_files_only, 1, "rank 1: "),
        ("deepspeed", no_end, 0, "No space left on device"),
    ],
)
def test_a_save_that_fails_on_one_rank_costs_all_a_line_and_the_next_one_counts(
    distributed, tmp_path, engine, trouble, on, reason
):
    outcomes = distributed(2, run, tmp_path / "run", engine, fails(trouble, {4: 1}, on))
    assert [outcome.error for outcome in outcomes] == [None, None]
    said = outcomes[0].said
    assert "step_00000004: could not be written: " in said and reason in said
    assert "; the next save tries again (1 of 3 in a row)" in said
    assert "Traceback" not in said
    assert steps(tmp_path / "run") == [2, 6]
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step_00000006"
    assert [step for step, *_ in outcomes[0].losses] == [1, 2, 3, 4, 5, 6]
    assert not outcomes[0].threads
    assert not [*(tmp_path / "run" / "checkpoints").glob("*.partial")]


@pytest.mark.parametrize("engine", ENGINES)
def test_too_many_in_a_row_end_the_run_with_a_line_and_it_goes_on_from_the_last_that_is_whole(
    distributed, tmp_path, engine
):
    folder = tmp_path / "run"
    more = dict(schedule__steps=12, checkpoint__save_every=1, checkpoint__max_failures=3)
    in_trouble = fails(small_files_only, dict.fromkeys([2, 3, 5, 6, 7], 1))  # 4 comes between
    (outcome,) = distributed(1, run, folder, engine, in_trouble, more)
    assert "step_00000007: could not be written: " in outcome.error
    assert "the last of checkpoint.max_failures=3 in a row, and ends the run" in outcome.error
    assert outcome.status == 1
    assert steps(folder) == [1, 4]
    more["schedule__steps"] = 8
    (again,) = distributed(1, run, folder, engine, None, more)
    assert again.whole and "at step 4" in again.said
    assert steps(folder) == [1, 4, 5, 6, 7, 8]
    distributed(1, run, tmp_path / "straight", engine, None, more)
    assert again.losses == logged(tmp_path / "straight")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_last_save_is_tried_again_and_without_it_the_run_has_not_finished(distributed, tmp_path, engine):
    (outcome,) = distributed(1, run, tmp_path / "late", engine, fails(no_end, {6: 2 + 1}))  # also the regular one
    assert outcome.whole and steps(tmp_path / "late") == [2, 4, 6]
    (outcome,) = distributed(1, run, tmp_path / "never", engine, fails(no_end, {4: 9, 6: 9}))
    assert "step_00000006: could not be written: " in outcome.error
    assert outcome.status == 1
    assert steps(tmp_path / "never") == [2]


@contextlib.contextmanager
def stopped_at_the_end(trainer, rank):
    """A signal comes when the last step is made, and no save of it succeeds."""
    stop = lambda *_: signal.SIGTERM if trainer.step == 6 else None  # noqa: E731
    with patch("omni_train.training.trainer.stop_agreed", stop), failing(trainer, rank, trouble=no_end, at={6: 99}):
        yield


@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_signal_the_last_save_is_tried_a_few_times_whatever_the_recipe_allows(distributed, tmp_path, engine):
    more = dict(checkpoint__max_failures=99)
    (outcome,) = distributed(1, run, tmp_path / "run", engine, stopped_at_the_end, more)
    assert outcome.error.startswith("stopped by SIGTERM; step 6 could not be saved")
    assert outcome.status == 1 and "(3 of 99 in a row)" in outcome.said and "(4 of 99" not in outcome.said
    (again,) = distributed(1, run, tmp_path / "run", engine)
    assert again.whole and "at step 4" in again.said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew_by_itself(distributed, tmp_path, engine):
    folder = tmp_path / "run"
    distributed(1, run, folder, engine, None, {"schedule__stop_after": 2})
    whole = logged(folder)
    (folder / "checkpoints").rename(tmp_path / "elsewhere")
    for outcome in distributed(1, run, folder, engine) + distributed(1, run, folder, engine):
        assert "has no checkpoint any more, and this run has saved some; restore them" in outcome.error
        assert outcome.status == 2 and logged(folder) == whole
    what_it_names = Path(re.search("or remove (.*) to start anew", outcome.error)[1])
    shutil.rmtree(what_it_names)
    (anew,) = distributed(1, run, folder, engine)
    assert anew.whole and what_it_names == folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("lost", ["metadata.json", "loader_00000.pt"])  # incomplete, damaged
def test_a_run_with_nothing_to_go_on_from_starts_anew_when_what_its_refusal_names_is_removed(
    distributed, tmp_path, engine, lost
):
    folder = tmp_path / "run"
    distributed(1, run, folder, engine, None, {"schedule__stop_after": 2})
    (folder / "checkpoints" / "step_00000002" / lost).unlink()
    (refused,) = distributed(1, run, folder, engine)
    assert "step_00000002" in refused.error and "no other to go on from" in refused.error
    shutil.rmtree(re.search("or remove (.*) to start anew", refused.error)[1])
    (anew,) = distributed(1, run, folder, engine)
    assert anew.whole and [step for step, *_ in anew.losses] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("log_every", "logged_steps"), [(4, [4, 6]), (10, [6])])
def test_the_last_step_is_logged_whatever_the_steps_between_two_lines(distributed, tmp_path, log_every, logged_steps):
    folder = tmp_path / "run"
    distributed(1, run, folder, "deepspeed", None, {"schedule__stop_after": 3, "schedule__log_every": log_every})
    assert not logged(folder)
    (outcome,) = distributed(1, run, folder, "deepspeed", None, {"schedule__log_every": log_every})
    assert [step for step, *_ in outcome.losses] == logged_steps


def no_process(*_, **__):
    raise AssertionError("a save started a process")


@contextlib.contextmanager
def without_processes(trainer, rank):
    with (
        patch.object(multiprocessing.process.BaseProcess, "start", no_process),
        patch.object(subprocess.Popen, "__init__", no_process),
        patch.object(os, "fork", no_process),
    ):
        yield


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_starts_no_process_and_leaves_no_thread(distributed, tmp_path, asynchronous):
    outcomes = distributed(
        2, run, tmp_path / "run", "megatron", without_processes, {"checkpoint__asynchronous": asynchronous}
    )
    assert [(outcome.error, outcome.threads) for outcome in outcomes] == [(None, [])] * 2
    assert steps(tmp_path / "run") == [2, 4, 6]


@contextlib.contextmanager
def written_late(trainer, rank):
    """What is saved is written when the step after has been taken."""
    from omni_train.checkpoint.sharded_write import Write

    stepped, write, train_step = threading.Event(), Write.run, trainer._train_step

    def write_late(self) -> None:
        assert stepped.wait(60)
        write(self)

    def step_first(count):
        metrics = train_step(count)
        stepped.set()
        return metrics

    def save_then_wait(save=trainer._save) -> None:
        stepped.clear()
        save()
        if trainer.step == trainer.recipe.schedule.steps:
            stepped.set()

    with (
        patch.object(Write, "run", write_late),
        patch.object(trainer, "_train_step", step_first),
        patch.object(trainer, "_save", save_then_wait),
    ):
        yield


def test_what_is_written_while_the_run_goes_on_is_what_was_saved(distributed, tmp_path):
    from omni_train.checkpoint.integrity import read_digests

    more = dict(schedule__steps=5)
    (late,) = distributed(1, run, tmp_path / "late", "megatron", written_late, more)
    (at_once,) = distributed(1, run, tmp_path / "at_once", "megatron", None, more | {"checkpoint__asynchronous": False})
    assert late.whole and at_once.whole and late.losses == at_once.losses
    for number in (2, 4, 5):
        one, other = (
            {name: digest for name, digest in read_digests(folder).items() if name.endswith((".distcp", ".pt"))}
            for folder in (tmp_path / name / "checkpoints" / f"step_{number:08d}" for name in ("late", "at_once"))
        )
        assert one == other and any(name.endswith(".distcp") for name in one)


def test_tensors_are_copied_also_where_they_are_on_the_host(monkeypatch):
    from omni_train.checkpoint.sharded_write import staged

    platform.setup()
    to = torch.Tensor.to
    while hasattr(to, "__wrapped__"):  # the tests' platform copies of its own accord, as from a GPU
        to = to.__wrapped__
    monkeypatch.setattr(torch.Tensor, "to", to)
    weight = torch.zeros(3)
    ((_, _, ((_, copy),)),) = staged([("path", "name", ([], [(None, weight)]))])
    weight += 1
    assert copy.tolist() == [0, 0, 0]


@contextlib.contextmanager
def stopped_while_it_writes(trainer, rank):
    """The run fails while a write goes on that would take for ever."""
    from omni_train.checkpoint.integrity import HashedFile

    train_step, write = trainer._train_step, HashedFile.write

    def write_for_ever(self, data) -> int:
        while not self._cancelled.is_set():
            time.sleep(0.01)
        return write(self, data)

    def fail(count):
        if trainer.step == 3:
            raise ArithmeticError("the run has failed")
        return train_step(count)

    with patch.object(HashedFile, "write", write_for_ever), patch.object(trainer, "_train_step", fail):
        yield


def test_a_run_that_fails_does_not_wait_for_what_it_writes(distributed, tmp_path):
    (outcome,) = distributed(1, run, tmp_path / "run", "megatron", stopped_while_it_writes)
    assert outcome.error == "the run has failed" and not outcome.threads
    assert steps(tmp_path / "run") == []
    (again,) = distributed(1, run, tmp_path / "run")
    assert again.whole and steps(tmp_path / "run") == [2, 4, 6]
    assert "has logged steps but no checkpoint; the run starts anew" in again.said


@contextlib.contextmanager
def useless_steps(trainer, rank):
    from omni_train.training.engines.megatron import StepResult

    with patch.object(
        trainer.engine, "train_step", lambda *_: StepResult({"loss": 1.0, "grad_norm": 0.0}, updated=False)
    ):
        yield


def test_useless_steps_are_counted_on_over_a_resume(distributed, tmp_path):
    more = dict(safety__max_nonfinite_steps=3)
    (first,) = distributed(1, run, tmp_path / "run", "megatron", useless_steps, more | {"schedule__stop_after": 2})
    assert first.whole
    (second,) = distributed(1, run, tmp_path / "run", "megatron", useless_steps, more)
    assert "step 4: non-finite loss or gradient 4 times in a row" in second.error
