"""Two starts of the same command: one trains, and the others say so and end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import psutil

from benchmarks.faults.chain import saving, stepping
from benchmarks.faults.start import Start
from benchmarks.faults.trial import LONE, TENSOR, Layout, Trial, Wrong


def twice(count: int, random) -> list[tuple[Layout, Callable[[Trial], None]]]:
    """Jobs of runs with a second start made at once, and another one while the first stands still somewhere."""
    jobs = []
    for number, size in enumerate(min(2, count - at) for at in range(0, count, 2)):
        moment = saving if number % 3 == 1 else stepping(random.randint(1, 8), random.uniform(0, 0.2))
        job = lambda trial, moments=[moment][: size - 1]: _again(trial, moments)  # noqa: E731
        jobs.append(([LONE, TENSOR][number % 2], job))
    return jobs


def _again(trial: Trial, moments: list) -> None:
    trial.moment = "two starts at once"
    both = [trial.start(), trial.start()]
    trial.faults[trial.moment] += 1
    both[0].until(lambda: both[1].process.poll() is not None)
    first, second = sorted(both, key=lambda start: start.process.poll() is not None)
    _refused(trial, second)
    for moment in moments:
        trial.moment = "a second start during the first"
        if not moment(trial, first):  # the one before took long to be refused
            trial.finished(first)
            trial.anew()
            first = trial.start()
            if not moment(trial, first):
                raise RuntimeError("the moment of the second start never came")
        with _frozen(first):
            trial.faults[trial.moment] += 1
            _refused(trial, trial.start())
    trial.finished(first)


def _refused(trial: Trial, start: Start) -> None:
    """Check that a start ended by itself, with the reason in one line."""
    code, said = start.exit_code(), [line for line in start.said.splitlines() if line.strip()]
    if code != 2 or len(said) != 1 or "error: " not in said[0]:
        trial.wrong(Wrong.end, f"the second start: exit code {code}, {len(said)} lines, not 2 and one: {said[-1:]}")
    if left := start.left():
        trial.wrong(Wrong.left, "; ".join(left))


@contextlib.contextmanager
def _frozen(start: Start) -> Iterator[None]:
    """Context in which all processes of a start stand still."""
    found = start.processes()
    _send(found, signal.SIGSTOP)
    try:
        yield
    finally:
        _send(found, signal.SIGCONT)


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
