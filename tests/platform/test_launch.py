"""What a user of launchers/local.sh relies on when a run ends: exit codes, output, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

LOCAL = Path(__file__).parents[2] / "launchers" / "local.sh"
LAUNCH = """
import sys
from omni_train.platform.launch import launch
sys.exit(launch(2, "tests.support.ranks", sys.argv[1:]))
"""


@pytest.fixture
def start(tmp_path):
    """Starts two ranks with a behaviour of tests.support.ranks, and ends them after the test."""
    launched = []

    def launch(behaviour: str) -> subprocess.Popen:
        command = [sys.executable, "-c", LAUNCH, behaviour, str(tmp_path)]
        launched.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return launched[-1]

    yield launch
    for process in launched:
        process.kill()  # its ranks die with it
        process.wait()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def rank_pids(folder: Path) -> list[int]:
    files = [folder / "rank0", folder / "rank1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_success_exits_0_and_adds_no_output(start):
    process = start("succeed")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_user_error_exits_2_and_its_line_is_all_that_is_printed(start):
    process = start("user_error")
    assert process.communicate(timeout=60) == ("", "error: parallel.tensor=3: no\n")
    assert process.returncode == 2


def test_sigterm_reaches_every_rank_and_their_success_is_the_launchers(start, tmp_path):
    process = start("wait_for_signal")
    rank_pids(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
    assert [(tmp_path / name).read_text() for name in ("rank0", "rank1")] == ["saved", "saved"]


def test_a_killed_rank_brings_the_others_down_and_is_named(start, tmp_path):
    process = start("sleep")
    pids = rank_pids(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert process.communicate(timeout=60) == ("", "rank 1 was killed by SIGKILL; the other ranks were stopped\n")
    assert process.returncode == 128 + signal.SIGKILL
    assert is_gone(pids[0])


def test_ranks_do_not_outlive_a_killed_launcher(start, tmp_path):
    process = start("sleep")
    pids = rank_pids(tmp_path)
    process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in pids), seconds=10)


@pytest.mark.parametrize("arguments", [[], ["2"], ["two", "train"], ["0", "train"]])
def test_a_wrong_number_of_processes_is_one_line_and_exit_2(arguments):
    result = subprocess.run([LOCAL, *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: launchers/local.sh N COMMAND")
    assert result.stderr.count("\n") == 1
