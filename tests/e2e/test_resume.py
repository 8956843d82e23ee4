"""A run that was interrupted ends as if it never had been."""

from __future__ import annotations

import random
import re
import shutil
import signal

import pytest

from omni_train.processes import Exit
from tests.e2e.conftest import Runs, kill


def losses(runs: Runs, run: str) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["tokens"], m.get("eval_loss")) for m in runs.metrics(run)]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    runs = Runs(world, tmp_path_factory.mktemp("uninterrupted"))
    runs.finish("run=whole", "schedule.eval_every=5", "schedule.eval_rows=2", "tracking=wandb_offline")
    return runs, losses(runs, "whole")


def test_a_run_logs_every_step_evaluates_saves_and_tracks(uninterrupted):
    runs, history = uninterrupted
    assert [step for step, *_ in history] == list(range(1, 13))
    assert [step for step, *_, held_out in history if held_out is not None] == [5, 10]
    folder = runs.folder / "whole"
    assert (folder / "recipe.yaml").exists()
    assert (folder / "checkpoints" / "latest").resolve().name == "step_00000012"
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (4, 8, 12)
    ]
    assert list(folder.rglob("run-*.wandb"))
    last = runs.metrics("whole")[-1]
    for name in ("lr", "tokens_per_second", "data_wait_seconds", "tflops_per_second", "aux_loss", "expert_load_max"):
        assert last[name] >= 0


def test_killed_at_a_random_step_and_started_again_it_ends_with_the_same_losses(runs, uninterrupted):
    overrides = ("run=killed", "schedule.eval_every=5", "schedule.eval_rows=2", "checkpoint.asynchronous=false")
    at = random.SystemRandom().randint(5, 11)
    process = runs.start(*overrides)
    runs.wait(lambda: len(runs.metrics("killed")) >= at, process)
    kill(process)
    assert "resuming from" in runs.finish(*overrides)
    assert losses(runs, "killed") == uninterrupted[1], f"killed at step {at}"


def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(runs, uninterrupted):
    overrides = ("run=saving", "schedule.eval_every=5", "schedule.eval_rows=2")
    checkpoints = runs.folder / "saving" / "checkpoints"
    process = runs.start(*overrides)
    runs.wait(lambda: (checkpoints / "step_00000008.partial").exists(), process)
    kill(process)
    assert (checkpoints / "step_00000008.partial").exists(), "the kill came too late"
    assert (checkpoints / "latest").resolve().name == "step_00000004"
    assert "step_00000004 at step 4" in runs.finish(*overrides)
    assert losses(runs, "saving") == uninterrupted[1]
    assert not list(checkpoints.glob("*.partial"))


def test_without_the_link_to_its_newest_checkpoint_a_run_goes_on_from_it_all_the_same(runs, uninterrupted):
    shutil.copytree(uninterrupted[0].folder / "whole", runs.folder / "whole", symlinks=True)
    checkpoints = runs.folder / "whole" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000012")  # as a link that leads nowhere is also one of a removed checkpoint
    err = runs.finish("run=whole", "schedule.eval_every=5", "schedule.eval_rows=2")
    assert "latest: does not lead to the newest complete checkpoint, step_00000008; now it does" in err
    assert "step_00000008 at step 8" in err
    assert losses(runs, "whole") == uninterrupted[1]
    assert (checkpoints / "latest").resolve().name == "step_00000012"


def test_a_second_start_of_a_run_is_refused_in_one_line_and_the_first_goes_on_as_if_nothing_had_been(
    runs, uninterrupted
):
    overrides = ("run=twice", "schedule.eval_every=5", "schedule.eval_rows=2", "checkpoint.asynchronous=false")
    first = runs.start(*overrides)
    runs.wait(lambda: len(runs.metrics("twice")) >= 5, first)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second has come that far
    before = {path: path.stat().st_mtime_ns for path in (runs.folder / "twice").rglob("*")}
    err = runs.finish(*overrides, "seed=5", status=2)
    who = rf"{runs.folder}/twice: process {first.pid} on .* at work here"
    assert re.fullmatch(rf"[^|\n]+ \| error: {who}; wait for it, stop it, or give another run=", err.strip())
    assert {path: path.stat().st_mtime_ns for path in (runs.folder / "twice").rglob("*")} == before
    first.send_signal(signal.SIGCONT)
    out, err = first.communicate(timeout=180)
    assert first.returncode == 0, err + out
    assert losses(runs, "twice") == uninterrupted[1]
    assert not (runs.folder / "twice" / ".lock").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_finishes_the_step_and_nothing_is_repeated(runs, ranks):
    evaluation = ["schedule.eval_every=1", "schedule.eval_rows=2"]  # which there is no time for after the signal
    layout = [f"parallel.tensor={ranks}", "checkpoint.save_every=1000", "run=signalled", *evaluation]
    process = runs.start(*layout, ranks=ranks)
    runs.wait(lambda: len(runs.metrics("signalled")) >= 3, process)
    process.send_signal(signal.SIGTERM if ranks == 2 else signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == Exit.stopped, err
    before = losses(runs, "signalled")
    said, last = (line.partition(" | ")[2] for line in err.splitlines() if "SIG" in line)
    assert "; a second Ctrl-C ends at once" in said
    stopped = re.fullmatch(r"stopped by SIG\w+ after step (\d+), saved; the same command goes on from here", last)
    assert err.endswith(f"{last}\n")
    assert "Traceback" not in err
    step = int(stopped[1])
    assert step - 1 <= len(before) <= step
    err = runs.finish(*layout, ranks=ranks)
    assert f"at step {step}" in err
    assert f"finished: step 12 of 12, checkpoints in {runs.folder}/signalled/checkpoints" in err.splitlines()[-1]
    after = losses(runs, "signalled")
    assert after[: len(before)] == before
    assert [step for step, *_ in after] == list(range(1, 13))
    assert all(held_out is not None for *_, held_out in after)


def test_every_layout_of_the_command_line_trains_like_one_rank(runs):
    runs.finish("run=start", "schedule.steps=0")
    base = ("schedule.steps=4", f"init_from={runs.folder}/start")
    runs.finish("run=one", *base)
    runs.finish("run=four", *base, "parallel.tensor=2", "parallel.context=2", ranks=4)
    for one, four in zip(runs.metrics("one"), runs.metrics("four"), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert four["tokens"] == one["tokens"]
