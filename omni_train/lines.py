"""Lines on standard error, for a person at a terminal or for a log. Imports nothing heavy, and never raises.

In a log every line begins with its time, host, job and rank: ``2026-11-27 06:40:12 node3 job 1234.0 rank 0 | …``. A log
is what a run writes where stderr is no terminal, and all that a SLURM job writes there.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import time

_in_a_run = False


def begin_log() -> None:
    """A run begins: what came before was the answer to a command."""
    global _in_a_run
    _in_a_run = True


def write(text: str) -> None:
    """Print lines at once. A full disk or a reader that has gone loses them, and nothing else."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        before = stamp() if _is_log() else ""
        sys.stderr.write("".join(f"{before}{line}\n" for line in text.splitlines()))
        sys.stderr.flush()


def show_cursor() -> None:
    """Undo what a progress bar did to the terminal, where the bar itself has no time to."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write("\033[?25h")


def flush() -> None:
    """Let what cannot be written any more go, else the interpreter ends with an exit code of its own for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@functools.cache
def host() -> str:
    """The name of this machine, up to the first dot."""
    return socket.gethostname().partition(".")[0]


def _is_log() -> bool:
    return (_in_a_run or "SLURM_JOB_ID" in os.environ) and not sys.stderr.isatty()


def stamp() -> str:
    """What a line of a log begins with."""
    words = [time.strftime("%Y-%m-%d %H:%M:%S"), host()]
    job, step, restarts = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    if job:
        words.append(f"job {job}.{step}" if step else f"job {job}")
    if restarts not in ("", "0"):
        words.append(f"restart {restarts}")
    if rank := os.environ.get("RANK"):
        words.append(f"rank {rank}")
    return " ".join(words) + " | "
