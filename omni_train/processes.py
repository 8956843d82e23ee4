"""How our processes end: the exit codes that mean something, and no child left behind. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from enum import IntEnum

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Exit(IntEnum):
    """Exit codes of every command; whoever starts one (a launcher, SLURM, a person's script) may rely on them."""

    finished = 0
    failed = 1  # a crash: worth another try
    wrong = 2  # something given is wrong, and one line says what: another try would end the same way
    stopped = 75  # asked to stop; all is saved, and the same command goes on (EX_TEMPFAIL of sysexits.h)
    interrupted = 130  # asked twice: ended at once


def die_with_parent(parent: int | None = None) -> None:
    """Let this process be killed when the one that started it ends, however that ends.

    Linux only; elsewhere nothing happens.

    Args:
        parent: process id of the one that started it, if known: it may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
