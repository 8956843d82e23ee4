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
    """Begin the log of a run: from here on lines may have a stamp."""
    global _in_a_run
    _in_a_run = True


def write(text: str) -> None:
    """Print lines on standard error and flush. A full disk or a closed pipe loses them, and raises nothing."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        before = stamp() if _is_log() else ""
        sys.stderr.write("".join(f"{before}{line}\n" for line in text.splitlines()))
        sys.stderr.flush()


def show_cursor() -> None:
    """Show the cursor that a progress bar has hidden, where the bar itself cannot any more."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write("\033[?25h")


def flush() -> None:
    """Flush the standard streams and drop what cannot be written: the interpreter's exit code would change for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@functools.cache
def host() -> str:
    """Name of this machine, up to the first dot."""
    return socket.gethostname().partition(".")[0]


def _is_log() -> bool:
    return (_in_a_run or "SLURM_JOB_ID" in os.environ) and not sys.stderr.isatty()


def stamp() -> str:
    """Stamp that a line of a log begins with: time, host, job and rank."""
    words = [time.strftime("%Y-%m-%d %H:%M:%S"), host()]
    job, step, restarts = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    if job:
        words.append(f"job {job}.{step}" if step else f"job {job}")
    if restarts not in ("", "0"):
        words.append(f"restart {restarts}")
    if rank := os.environ.get("RANK"):
        words.append(f"rank {rank}")
    return " ".join(words) + " | "
