"""What a process does with the signals that ask it to stop; whole launches are in test_launch.py."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from omni_train.processes import Exit

BEGIN = """
import os, signal, subprocess, sys, time
from omni_train import stopping
stopping.listen()
def ask(name):
    os.kill(os.getpid(), signal.Signals[name])
    while stopping.asked() is None:
        time.sleep(0.01)
"""


def run(program: str) -> tuple[int, str]:
    """Exit code and stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + program], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_with_nothing_to_save_the_first_signal_ends_the_process(name):
    code, err = run(f"stopping.at_once('at step 40, nothing new to save')\nask('{name}')\ntime.sleep(60)")
    assert code == Exit.stopped
    assert err == f"stopped by {name} at step 40, nothing new to save; the same command goes on from here\n"


def test_a_signal_that_came_while_all_was_saved_ends_it_before_more_is_begun():
    code, err = run(
        "stopping.finish_first('finishing step 1 and saving')\nask('SIGTERM')\ntime.sleep(0.3)\n"
        "stopping.at_once('at the start of stage 2')\nprint('went on', file=sys.stderr)"
    )
    assert code == Exit.stopped
    assert err.splitlines()[-1] == "stopped by SIGTERM at the start of stage 2; the same command goes on from here"
    assert "went on" not in err


def test_what_all_ranks_agreed_on_is_not_said_again_when_the_signal_reaches_this_one():
    code, err = run(
        "stopping.finish_first('finishing step 1 and saving')\nstopping.agreed(signal.SIGUSR1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.5)\nsys.exit(stopping.asked())"
    )
    assert (code, err) == (signal.SIGUSR1, "")


def test_a_signal_after_a_rank_was_lost_ends_the_process_with_that_reason():
    code, err = run(
        "stopping.finish_first('finishing step 1 and saving')\n"
        "stopping.unless_lost(lambda: (1, 'ValueError: no on rank 3 at node3'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
    )
    assert (code, err) == (1, "failed: ValueError: no on rank 3 at node3\n")


def test_a_question_that_hangs_keeps_no_second_ctrl_c_from_ending_the_process():
    code, _ = run(
        "stopping.finish_first('finishing step 1 and saving')\nstopping.unless_lost(lambda: time.sleep(60))\n"
        "ask('SIGINT')\ntime.sleep(0.3)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    )
    assert code == Exit.interrupted


def test_other_programs_of_the_run_are_ended_before_its_last_line():
    code, err = run(
        "stopping.at_once('in stage 2')\n"
        "stopping.end_too(lambda: print('the other ends', file=sys.stderr, flush=True))\n"
        "ask('SIGTERM')\ntime.sleep(60)"
    )
    assert code == Exit.stopped
    assert err == "the other ends\nstopped by SIGTERM in stage 2; the same command goes on from here\n"


def test_the_line_that_says_why_a_process_ended_is_its_last():
    code, err = run(
        "write = stopping.lines.write\nstopping.lines.write = lambda line: (write(line), time.sleep(1))\n"
        "stopping.unless_lost(lambda: time.sleep(0.5))\n"  # so that the first signal's line comes late
        "stopping.finish_first('finishing step 1 and saving')\n"
        "os.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    )
    assert code == Exit.interrupted
    assert err == "interrupted: ended at once by a second Ctrl-C; what was saved before is kept\n"


def test_signals_to_forked_helpers_are_not_the_runs_and_programs_inherit_nothing():
    code, err = run(
        "stopping.finish_first('finishing step 1 and saving')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    signal.signal(signal.SIGINT, lambda *_: None)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert os.WTERMSIG(status) == signal.SIGTERM, status\n"
        "program = subprocess.Popen(['sleep', '60'])\n"
        "program.send_signal(signal.SIGINT)\n"
        "assert program.wait() == -signal.SIGINT\n"
        "time.sleep(0.3)\n"
        "assert stopping.asked() is None"
    )
    assert (code, err) == (0, "")


def test_after_its_last_line_a_schedulers_signal_changes_nothing():
    code, err = run("stopping.over()\nos.kill(os.getpid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGUSR1)")
    assert (code, err) == (0, "")
