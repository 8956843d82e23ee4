"""Whole runs that are stopped, interrupted or robbed of a rank, at other moments than in a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from omni_train.processes import Exit
from tests.e2e.conftest import Runs, kill

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="watches processes by Linux's /proc")


def heeds(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal that is not one of the interpreter's own."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


def test_a_signal_at_the_start_ends_a_run_before_it_has_written_anything(runs: Runs):
    process = runs.start("run=early")
    try:
        runs.wait(lambda: heeds(process.pid, signal.SIGUSR1), process)  # its first line: torch is not imported yet
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        kill(process)
    assert (process.returncode, out) == (Exit.stopped, "")
    assert err == "stopped by SIGTERM at the start, nothing new to save; the same command goes on from here\n"
    assert not list(runs.folder.iterdir())


def test_a_second_ctrl_c_ends_a_run_and_its_workers_also_while_it_saves(runs: Runs):
    process = runs.start("run=saving", "checkpoint.save_every=1", "schedule.steps=1000")
    try:
        runs.wait(lambda: list((runs.folder / "saving" / "checkpoints").glob("*.partial")), process)
        helpers = psutil.Process(process.pid).children(recursive=True)
        assert helpers
        process.send_signal(signal.SIGINT)
        runs.wait(lambda: signal.SIGINT not in pending(process.pid), process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        psutil.wait_procs(helpers, timeout=30)
        assert not any(helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE for helper in helpers)
    finally:
        kill(process)
    assert process.returncode == Exit.interrupted
    assert "interrupted: ended at once by a second Ctrl-C" in err.splitlines()[-1]


def pending(pid: int) -> set[int]:
    """Signals that wait for a process to take them."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {number for number in range(1, 32) if int(status["ShdPnd"], 16) >> (number - 1) & 1}


def test_a_lost_rank_ends_the_others_which_say_so_in_one_line(runs: Runs):
    process = runs.start("run=lost", "parallel.tensor=2", "schedule.steps=1000", ranks=2)
    try:
        runs.wait(lambda: len(runs.metrics("lost")) >= 2, process)
        ranks = {rank.environ().get("RANK"): rank for rank in psutil.Process(process.pid).children()}
        os.kill(ranks["1"].pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert not ranks["0"].is_running() or ranks["0"].status() == psutil.STATUS_ZOMBIE
    finally:
        kill(process)
    assert process.returncode == 128 + signal.SIGKILL
    by_rank_0, by_launcher = err.splitlines()[-2:]
    assert by_rank_0.endswith("rank 0 | failed: rank 1 was killed by SIGKILL")
    assert by_launcher.endswith(" | rank 1 was killed by SIGKILL; the other ranks were stopped")
    assert "Traceback" not in err
