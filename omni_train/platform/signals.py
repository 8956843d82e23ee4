"""Signals that ask for a clean end, and the watchdog over steps that hang."""

from __future__ import annotations

import faulthandler
import signal
import sys

import torch

from omni_train.platform.device import device


class StopRequest:
    """Remembers SIGTERM and SIGUSR1, what schedulers send before they kill; all ranks agree on whether to stop."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def _remember(self, number, _frame) -> None:
        self.name = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        flag = torch.tensor([1.0 if self.name else 0.0], device=device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def close(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """Dumps the stacks of all threads and ends the process with a failure when a step takes too long.

    Args:
        seconds: longest time between two :meth:`alive` calls.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def alive(self) -> None:
        """A step begins: start counting again."""
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.stderr)

    def stop(self) -> None:
        """Nothing is watched from here on."""
        faulthandler.cancel_dump_traceback_later()
