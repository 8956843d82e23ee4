"""Agreement of the ranks on a signal that stops the run, and the watchdog over what hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time

import torch

from omni_train import lines, stopping
from omni_train.platform.device import device, rank
from omni_train.processes import Exit

_LEFT_TO_THE_LIBRARY = 30.0  # seconds that the watchdog has for its own line, should it be held up too


def stop_agreed(group: torch.distributed.ProcessGroup | None = None) -> signal.Signals | None:
    """Signal that stops the run, whichever rank of the group received it, or None. Collective."""
    asked = stopping.asked()
    flag = torch.tensor([float(asked or 0)], device=device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
    if not flag:
        return None
    stopping.agreed(int(flag))
    return stopping.asked()


def cut_short(group: torch.distributed.ProcessGroup | None = None) -> bool:
    """Whether a signal stops the run, so that the rest of an evaluation is left. Resets the watchdog.

    To be called between two pieces of work. Collective over the group; without one this rank decides alone.

    Args:
        group: the ranks that share the work.
    """
    alive()
    if group is None or group.size() == 1:
        return stopping.asked() is not None
    return stop_agreed(group) is not None


def alive() -> None:
    """Reset the watchdog, if there is one, as the run makes progress."""
    if _watchdog is not None:
        _watchdog.alive()


_watchdog: Watchdog | None = None


class Watchdog:
    """Watchdog that ends a process that makes no progress, after it has dumped the stacks of all threads.

    Args:
        seconds: longest time between two calls of :func:`alive`, and before the first.
    """

    def __init__(self, seconds: float) -> None:
        global _watchdog
        _watchdog = self
        self.seconds = seconds
        self._stopped = threading.Event()
        self.alive()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self) -> None:
        """Reset the time, as the run makes progress."""
        self._deadline = time.monotonic() + self.seconds
        faulthandler.dump_traceback_later(self.seconds + _LEFT_TO_THE_LIBRARY, exit=True, file=sys.stderr)

    def stop(self) -> None:
        """Stop watching."""
        global _watchdog
        _watchdog = None
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                faulthandler.dump_traceback(file=sys.stderr)
                lines.write(
                    f"failed: nothing moved for {self.seconds:g} s on rank {rank()} at {lines.host()}, which is more "
                    "than safety.hang_seconds; what each thread was doing stands above"
                )
                os._exit(Exit.failed)
