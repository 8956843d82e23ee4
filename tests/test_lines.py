"""Lines of a run on stderr: stamped in a log, clean at a terminal, and never the end of the run."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from omni_train import lines

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ "
PROGRAM = """
import sys
from omni_train import lines
lines.begin_log()
for number in range(3):
    lines.write(f"line {number}")
print("answer")
lines.flush()
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("environment", "stamp"),
    [
        ({"RANK": "3"}, STAMP + r"rank 3 \| "),
        ({"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "RANK": "0"}, STAMP + r"job 1234\.0 rank 0 \| "),
        ({"SLURM_JOB_ID": "1234", "SLURM_RESTART_COUNT": "10"}, STAMP + r"job 1234 restart 10 \| "),
    ],
)
def test_a_line_of_a_log_says_when_where_and_of_what(monkeypatch, capsys, environment, stamp):
    for name in ("RANK", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lines, "_in_a_run", "SLURM_JOB_ID" not in environment)  # all that a job writes is a log
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines.write("one\ntwo")
    written = capsys.readouterr().err.splitlines()
    assert [re.sub(f"^{stamp}", "", line) for line in written] == ["one", "two"]
    assert all(re.match(stamp, line) for line in written)


def run(environment: dict | None = None, **streams) -> int:
    """Exit code of the program, whose answer on stdout waits in a buffer."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | (
        environment or {}
    )
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, timeout=60, **streams).returncode


def test_at_a_terminal_lines_are_bare():
    ours, terminal = pty.openpty()
    assert run({"SLURM_JOB_ID": "1234"}, stderr=terminal, stdout=subprocess.DEVNULL) == 7
    assert os.read(ours, 1000) == b"line 0\r\nline 1\r\nline 2\r\n"
    os.close(ours)
    os.close(terminal)


def test_a_reader_that_has_gone_changes_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    assert run(stderr=writing, stdout=writing) == 7
    os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_changes_nothing():
    with open("/dev/full", "w") as full:
        assert run(stderr=full, stdout=full) == 7
