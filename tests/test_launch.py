"""What a user of omni-train launch relies on when a run ends: exit codes, output, signals, nothing left behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import psutil
import pytest

from omni_train import cli, launch, machine, stopping
from omni_train.processes import Exit

LOCAL = Path(__file__).parents[1] / "launchers" / "local.sh"
LAUNCH = """
import sys
from omni_train.launch import launch
sys.exit(launch(2, "tests.support.ranks", sys.argv[1:]))
"""
FINISHING = "finishing step 1 and saving; a second Ctrl-C ends at once\n"
NOTHING_TO_SAVE = "at the start, nothing new to save; the same command goes on from here\n"
INTERRUPTED = "interrupted: ended at once by a second Ctrl-C; what was saved before is kept\n"


@pytest.fixture
def start(tmp_path):
    """Starts two ranks with a behaviour of tests.support.ranks, or one by itself, and ends them after the test."""
    launched = []

    def launch(behaviour: str, ranks: int = 2, **options) -> subprocess.Popen:
        program = ["-c", LAUNCH] if ranks == 2 else ["-m", "tests.support.ranks"]
        command = [sys.executable, *program, behaviour, str(tmp_path)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        launched.append(subprocess.Popen(command, **options))
        return launched[-1]

    yield launch
    for process in launched:
        process.kill()  # its ranks die with it
        process.wait()


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def rank_pids(folder: Path, ranks: int = 2) -> list[int]:
    """Process ids of ranks that have said that they run."""
    files = [folder / f"rank{rank}" for rank in range(ranks)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def signals_of(pid: int, field: str) -> set[int]:
    """Those of a process that /proc has in a field: ``SigBlk`` blocked, ``ShdPnd`` waiting."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {number for number in range(1, 32) if int(status[field], 16) >> (number - 1) & 1}


def test_success_exits_0_and_adds_no_output(start):
    process = start("succeed")
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 0


def test_a_user_error_exits_2_and_its_line_is_all_that_is_printed(start):
    process = start("user_error")
    assert process.communicate(timeout=120) == ("", "error: parallel.tensor=3: no\n")
    assert process.returncode == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_rank_and_that_they_stopped_is_the_launchers_exit_code(start, tmp_path, name):
    process = start("train")
    rank_pids(tmp_path)
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=120) == ("", f"{name}: {FINISHING}")
    assert process.returncode == Exit.stopped
    assert [(tmp_path / name).read_text() for name in ("rank0", "rank1")] == ["saved", "saved"]


def test_a_launcher_that_was_stopped_goes_on_and_makes_up_no_signal(start, tmp_path):
    process = start("train")
    rank_pids(tmp_path)
    for _ in range(3):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)  # longer than it looks at its ranks
        process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
    assert process.poll() is None
    assert not any((tmp_path / name).read_text().startswith("saved") for name in ("rank0", "rank1"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == Exit.stopped


def test_a_signal_before_the_ranks_can_hear_it_is_kept_for_them(start, tmp_path):
    process = start("start")
    wait_until(lambda: signal.SIGTERM in signals_of(process.pid, "SigBlk"))
    process.send_signal(signal.SIGTERM)  # to the launcher alone, at its first moment
    rank_pids(tmp_path)
    (tmp_path / "heed").touch()
    assert process.communicate(timeout=120) == ("", f"stopped by SIGTERM {NOTHING_TO_SAVE}")
    assert process.returncode == Exit.stopped


def test_a_signal_to_one_rank_alone_stops_all(start, tmp_path):
    process = start("start")
    pids = rank_pids(tmp_path)
    (tmp_path / "heed").touch()
    os.kill(pids[1], signal.SIGUSR1)
    assert process.communicate(timeout=120) == ("", f"stopped by SIGTERM {NOTHING_TO_SAVE}")  # what the launcher sends
    assert process.returncode == Exit.stopped
    assert is_gone(pids[0])


def at_a_terminal(start, folder: Path, behaviour: str, ranks: int, times: int) -> tuple[int, str]:
    """Exit code and stderr of ranks at a terminal where Ctrl-C is typed."""
    keyboard, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    errors = folder / "stderr"
    with errors.open("w") as file:
        process = start(behaviour, ranks, stdin=terminal, stderr=file, preexec_fn=take_terminal)
    rank_pids(folder, ranks)
    for count in range(times):
        wait_until(lambda count=count: errors.read_text().count("\n") == count)
        os.write(keyboard, b"\x03")
    process.wait(timeout=120)
    os.close(keyboard)
    os.close(terminal)
    return process.returncode, errors.read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_ctrl_c_counts_once_whoever_the_terminal_sends_it_to(start, tmp_path, ranks):
    code, err = at_a_terminal(start, tmp_path, "train", ranks, times=1)
    assert (code, err) == (Exit.stopped, f"SIGINT: {FINISHING}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_at_once_what_hangs(start, tmp_path, ranks):
    code, err = at_a_terminal(start, tmp_path, "hang", ranks, times=2)
    assert (code, err) == (Exit.interrupted, f"SIGINT: {FINISHING}{INTERRUPTED}")


def test_ranks_that_hear_nothing_are_killed_at_the_second_ctrl_c(start, tmp_path):
    process = start("deaf")
    pids = rank_pids(tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not signals_of(process.pid, "ShdPnd"))
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == Exit.interrupted
    assert all(is_gone(pid) for pid in pids)


def test_a_killed_rank_brings_the_others_down_and_is_named(start, tmp_path):
    process = start("sleep")
    pids = rank_pids(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert process.communicate(timeout=120) == ("", "rank 1 was killed by SIGKILL; the other ranks were stopped\n")
    assert process.returncode == 128 + signal.SIGKILL
    assert is_gone(pids[0])


def test_ranks_that_outlast_the_grace_after_another_was_lost_are_killed(start, tmp_path):
    process = start("deaf")
    pids = rank_pids(tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert err == "rank 0 was killed by SIGKILL; the other ranks were stopped\n"
    assert is_gone(pids[1])


@pytest.mark.parametrize("behaviour", ["sleep", "hang", "deaf"])
def test_ranks_do_not_outlive_a_killed_launcher(start, tmp_path, behaviour):
    process = start(behaviour)
    pids = rank_pids(tmp_path)
    process.kill()
    wait_until(lambda: all(is_gone(pid) for pid in pids), seconds=30)


def test_a_rank_whose_launcher_was_killed_before_its_first_line_ends_too(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-m", "tests.support.ranks", "sleep", str(tmp_path)]
    environment = {**os.environ, "OMNI_TRAIN_LAUNCHER": str(gone.pid)}
    assert subprocess.run(command, env=environment, timeout=60).returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "launch has no number: write omni-train launch N COMMAND …"),
        (["two", "train"], "launch two: write omni-train launch N COMMAND …"),
        (["99999999", "train"], "launch 99999999: must be at most"),
        (["0", "train"], "launch 0: write omni-train launch N COMMAND …"),
        (["2"], "launch 2 : needs one of train, pipeline, data, convert"),
        (["2", "launch", "2", "train"], "launch 2 launch: needs one of train, pipeline, data, convert"),
    ],
)
def test_a_mistake_of_the_launch_is_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(["launch", *arguments]) == Exit.wrong
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_script_is_the_command_and_a_lone_process_takes_its_place(tmp_path):
    words = [LOCAL, "1", "train", "nosuch=1"]
    environment = {**os.environ, "OMNI_TRAIN_PYTHON": sys.executable, "PYTHONPATH": str(LOCAL.parents[1])}
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (
        Exit.wrong,
        "error: nosuch is not a key of the recipe; omni-train train --help lists them\n",
    )


def test_a_lone_process_has_the_settings_and_no_place_among_ranks(monkeypatch):
    became = []
    monkeypatch.setattr(os, "execve", lambda *how: became.append(how) or sys.exit(7))
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    with pytest.raises(SystemExit):
        launch.main(["1", "train", "seed=2"], ("train",))
    stopping.let_go()
    [(program, command, environment)] = became
    assert program == sys.executable and command[1:] == ["-m", "omni_train", "train", "seed=2"]
    assert environment["PYTHONSAFEPATH"] == "1"
    assert not {"WORLD_SIZE", "OMP_NUM_THREADS", machine.FULL_WIDTH} & environment.keys()


def test_the_ranks_have_a_place_and_the_settings(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_"))}
    done = subprocess.run([sys.executable, "-c", LAUNCH, "tell", str(tmp_path)], env=environment, timeout=120)
    assert done.returncode == 0
    ranks = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)]
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    settings = machine.environment(2)
    assert all(rank["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2)) for rank in ranks)
    assert all(rank.get(name) == settings.get(name) for rank in ranks for name in ("MALLOC_TRIM_THRESHOLD_",))
