"""One process at a time holds a directory, on whatever machine it is, and however another one ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from omni_train import locks
from omni_train.errors import UserError
from omni_train.locks import DirectoryLock, Holder

ROOT = Path(__file__).parents[1]

# Tries for the lock, says how that ended, and holds what it got until its input ends.
TAKE = """
import sys
from pathlib import Path
from omni_train.errors import UserError
from omni_train.locks import DirectoryLock
for line in sys.stdin:
    lock = DirectoryLock(Path(line.strip()), remedy="go")
    try:
        lock.acquire()
        print("held", flush=True)
    except UserError as error:
        print(error, flush=True)
        continue
    sys.stdin.readline()
    lock.release()
    print("released", flush=True)
"""


class Process:
    """A process that takes locks when told to."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", TAKE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def tell(self, line: object) -> None:
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()

    def hear(self) -> str:
        return self.popen.stdout.readline().strip()


@pytest.fixture
def processes():
    """Two processes."""
    both = [Process(), Process()]
    yield both
    for process in both:
        process.popen.kill()
        process.popen.communicate()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(locks, "SILENT_POLLS", 50)


def left_by(directory: Path, **changes) -> Holder:
    """A lock that a process left behind."""
    holder = replace(Holder.here(), **changes)
    (directory / ".lock").write_text(json.dumps(asdict(holder)) + "\n")
    return holder


def take(directory: Path) -> DirectoryLock:
    lock = DirectoryLock(directory, remedy="give another run=")
    lock.acquire()
    return lock


def state(directory: Path) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in [directory, *directory.rglob("*")] if path.name != ".lock"}


def test_of_two_that_start_at_the_same_moment_exactly_one_wins(processes, tmp_path):
    """Over and over; every other time both find what one that was killed left behind."""
    for number in range(10):
        directory = tmp_path / str(number)
        directory.mkdir()
        if number % 2:
            left_by(directory, pid=2**22 + 1)
        for process in processes:
            process.tell(directory)
        answers = [process.hear() for process in processes]
        assert sorted(answer == "held" for answer in answers) == [False, True], answers
        winner, loser = sorted(processes, key=lambda process: answers[processes.index(process)] != "held")
        line = answers[processes.index(loser)]
        assert line.startswith(f"{directory}: process {winner.popen.pid} on ") and "wait for it, stop it, or go" in line
        winner.tell("")
        assert winner.hear() == "released"
        assert list(directory.iterdir()) == []


def test_threads_that_race_for_what_a_killed_process_left_never_both_hold_it(tmp_path, monkeypatch):
    """The lock that the first takes over is not taken from it by one that had seen the old one too."""
    read, barrier = DirectoryLock._read, threading.Barrier(4)

    def read_together(lock):
        content = read(lock)
        if not getattr(lock, "has_seen", False):
            lock.has_seen = True
            barrier.wait(30)
        return content

    monkeypatch.setattr(DirectoryLock, "_read", read_together)
    for number in range(5):
        directory = tmp_path / str(number)
        directory.mkdir()
        left_by(directory, pid=2**22 + 1)
        held = []

        def start(directory=directory, held=held):
            try:
                held.append(take(directory))
            except UserError:
                held.append(None)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        [lock] = filter(None, held)
        lock.check()
        lock.release()
        assert list(directory.iterdir()) == []


def test_a_second_start_is_refused_in_one_line_and_touches_nothing(tmp_path):
    holder = take(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("1")
    before = state(tmp_path)
    with pytest.raises(UserError) as refused:
        take(tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{tmp_path}: process {os.getpid()} on {Holder.here().host} (since ")
    assert line.endswith("is at work here; wait for it, stop it, or give another run=") and "\n" not in line
    assert state(tmp_path) == before
    holder.release()
    take(tmp_path).release()


def test_one_that_was_killed_is_taken_over_at_once(tmp_path, processes, capsys):
    killed = processes[0]
    killed.tell(tmp_path)
    assert killed.hear() == "held"
    with pytest.raises(UserError):
        take(tmp_path)
    killed.popen.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, killed.popen.pid, os.WEXITED | os.WNOWAIT)  # a zombie, as its parent has not asked yet
    take(tmp_path).release()
    assert f"process {killed.popen.pid} on " in (said := capsys.readouterr().err)
    assert "has ended without a word; this goes on instead" in said and "sign of life" not in said


@pytest.mark.parametrize(
    ("changes", "restart"),
    [
        ({"pid": 2**22 + 1}, "0"),
        ({"started": "1"}, "0"),  # its number is another's by now
        ({"host": "other", "kernel": "other", "job": "77"}, "1"),
    ],
    ids=["no such process", "another process of that number", "the job's start before"],
)
def test_who_is_known_to_have_ended_is_taken_over_without_waiting(tmp_path, changes, restart, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    monkeypatch.setattr(DirectoryLock, "_is_silent", lambda *_: pytest.fail("it watched"))
    left_by(tmp_path, **{"restart": 0} | changes)
    take(tmp_path).check()
    assert "has ended without a word" in capsys.readouterr().err


ELSEWHERE = {"host": "node7", "kernel": "another machine", "job": "78"}


@pytest.mark.parametrize(
    "left", [ELSEWHERE, {"kernel": "another container"}, None], ids=["host", "container", "damaged"]
)
def test_who_cannot_be_looked_up_is_taken_over_after_a_silence(tmp_path, left, capsys):
    if left is None:
        (tmp_path / ".lock").write_text("")
    else:
        left_by(tmp_path, **left)
    os.utime(tmp_path / ".lock", (4e9, 4e9))  # by a clock that is decades ahead
    waited = []
    lock = DirectoryLock(tmp_path, remedy="")
    lock.acquire(waiting=lambda: waited.append(1))
    lock.check()
    lock.release()
    assert len(waited) >= locks.SILENT_POLLS
    assert "waiting for a sign of life" in capsys.readouterr().err


def test_who_shows_a_sign_of_life_is_not_taken_over(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as elsewhere:
        there = replace(Holder.here(), **ELSEWHERE)
        elsewhere.setattr(Holder, "here", lambda: there)
        holder = take(tmp_path)
    with pytest.raises(UserError, match=r"process \d+ on node7 \(SLURM job 78, start 1; since .*\) is at work here"):
        take(tmp_path)
    holder.check()
    holder.release()


def test_one_that_was_suspended_notices_that_another_took_over(tmp_path, monkeypatch):
    suspended = take(tmp_path)
    left_by(tmp_path, pid=2**22 + 1)  # as if it had been judged so
    other = take(tmp_path)
    other._stop.set()  # the other falls silent
    other._thread.join()
    silent = other.path.read_bytes()
    time.sleep(3 * locks.HEARTBEAT_SECONDS)  # it beats on, into a file that is nobody's
    assert other.path.read_bytes() == silent
    with pytest.raises(UserError, match=rf"process \d+ on .* took over while process {os.getpid()} was at work here"):
        suspended.check()
    suspended.release()
    other.check()
    other.release()


def test_one_whose_lock_was_removed_notices(tmp_path):
    lock = take(tmp_path)
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match=r"\.lock was removed while"):
        lock.check()
    lock.release()


def test_what_a_command_that_was_killed_while_it_took_over_left_does_not_stay_in_the_way(tmp_path):
    holder = left_by(tmp_path, pid=2**22 + 1)
    (tmp_path / f".lock.{holder.token}").touch()
    take(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_from_elsewhere_names_no_file_but_its_own(tmp_path):
    left_by(tmp_path, token="/../../victim", pid=2**22 + 1)
    left_by(tmp_path, token="../victim", pid=2**22 + 1)
    take(tmp_path / ".").release()
    left_by(tmp_path, pid="1", restart="2", host="a\nb")
    take(tmp_path / ".").release()
    assert list(tmp_path.iterdir()) == []
    assert not (tmp_path.parent / "victim").exists()


def test_where_nothing_can_be_written_it_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        take(tmp_path / "file" / "run")
