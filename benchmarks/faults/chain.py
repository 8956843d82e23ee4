"""Faults at moments of a run, one after the other: killed or stopped, and the same command again each time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from benchmarks.faults.start import Start
from benchmarks.faults.trial import EVAL_EVERY, LONE, PIPELINE, TENSOR, ZERO, Layout, Trial

KILLED = 128 + signal.SIGKILL
STOPPED, INTERRUPTED = 75, 130


@dataclass
class Fault:
    """Fault: an action on a start at a moment, after which its exit code is one of `codes`."""

    moment: Callable[[Trial, Start], bool]  # waits for it; False where the command ended before
    inject: Callable[[Trial, Start], set[int]]  # returns the exit codes that are right
    name: str
    terminal: bool = False


def chain(trial: Trial, faults: list[Fault]) -> None:
    """Put faults into a run, each into a start of its own, and end it; where it ends before, into another run."""
    for fault in faults:
        for _ in range(3):
            trial.moment = fault.name
            start = trial.start(terminal=fault.terminal)
            if fault.moment(trial, start) and not trial.nearly_done(start):
                codes = fault.inject(trial, start)
                trial.faults[fault.name] += 1
                trial.ended(start, codes)
                break
            trial.moment = f"before {fault.name}"
            trial.finished(start)
            trial.anew()
        else:
            raise RuntimeError(f"{fault.name}: never came")
    trial.finish()


# Moments


def starting(part: float) -> Callable[[Trial, Start], bool]:
    """Moment after a part of the time that a start takes until its first step."""
    return lambda trial, start: later(start, part * trial.reference.startup)


def stepping(steps: int, delay: float) -> Callable[[Trial, Start], bool]:
    """Moment of some logged steps after a start has resumed, and some seconds."""
    return lambda trial, start: (
        start.until(lambda: trial.steps(start) >= start.before.step + steps) and later(start, delay)
    )


def evaluating(delay: float) -> Callable[[Trial, Start], bool]:
    """Moment about an evaluation: some seconds after the step before it was logged."""

    def comes_next(trial: Trial, start: Start) -> bool:
        steps = trial.steps(start)
        return steps > start.before.step and steps % EVAL_EVERY == EVAL_EVERY - 1

    return lambda trial, start: start.until(lambda: comes_next(trial, start)) and later(start, delay)


def saving(trial: Trial, start: Start) -> bool:
    """Wait until a checkpoint is being written."""
    return start.until(lambda: bool(trial.partial() - start.before.partial))


def importing(trial: Trial, start: Start) -> bool:
    """Wait until PyTorch is being imported."""
    return start.until(lambda: start.loaded("libtorch_cpu"))


def building(trial: Trial, start: Start) -> bool:
    """Wait until the ranks have found each other; the model comes next."""
    return start.until(lambda: start.opened("socket:")) and later(start, 0.1)


def reading(trial: Trial, start: Start) -> bool:
    """Wait until a checkpoint is being read."""
    return start.until(lambda: start.opened("checkpoints/step_"))


def between_stages(number: int, delay: float) -> Callable[[Trial, Start], bool]:
    """Moment at which a stage of a pipeline is complete and the next has no step yet."""
    return lambda trial, start: (
        start.until(lambda: trial.newest(PIPELINE.stages[number]) == PIPELINE.steps) and later(start, delay)
    )


def later(start: Start, seconds: float) -> bool:
    """Wait some seconds."""
    end = time.monotonic() + seconds
    return start.until(lambda: time.monotonic() >= end)


# What is done


def kill(whom: str) -> Callable[[Trial, Start], set[int]]:
    """Action of kill -9: ``everything``, the ``process`` that was started, the process ``group``, or one ``rank``."""

    def inject(trial: Trial, start: Start) -> set[int]:
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if whom == "everything":
                start.kill()
            elif whom == "group":
                os.killpg(start.process.pid, signal.SIGKILL)
            elif whom == "rank" and (ranks := start.ranks()):
                trial.random.choice(ranks).send_signal(signal.SIGKILL)
            else:
                start.process.kill()
        return {KILLED}

    return inject


def send(number: int, whom: str) -> Callable[[Trial, Start], set[int]]:
    """Action of sending a signal that asks to stop, to the ``process`` that was started or to its ``group``."""

    def inject(trial: Trial, start: Start) -> set[int]:
        os.kill(start.process.pid if whom == "process" else -start.process.pid, number)
        return {STOPPED}

    return inject


def send_at_once(number: int) -> Callable[[Trial, Start], set[int]]:
    """Action of :func:`send` when Python may not have begun to run our code: then there is nothing to be lost."""

    def inject(trial: Trial, start: Start) -> set[int]:
        os.kill(start.process.pid, number)
        return {STOPPED, 128 + number}

    return inject


def interrupt_once(trial: Trial, start: Start) -> set[int]:
    """Type ^C."""
    start.type(b"\x03")
    return {STOPPED}


def interrupt_twice(trial: Trial, start: Start) -> set[int]:
    """Type ^C, and again when the run has said that it will end."""
    start.type(b"\x03")
    told = time.monotonic() + 2
    start.until(lambda: "Ctrl-C" in start.said or time.monotonic() > told)
    start.type(b"\x03")
    return {INTERRUPTED}


# Scenarios


def kills(count: int, random) -> list[tuple[Layout, Callable[[Trial], None]]]:
    """Chains of up to five kills: one at the start, one inside a save, the others in steps."""
    layouts = [LONE, TENSOR, LONE, ZERO, LONE, PIPELINE, LONE, TENSOR, LONE, ZERO]
    made = []
    for number, size in enumerate(_shares(count, 5)):
        layout = layouts[number % len(layouts)]
        whom = ["everything", "process", *(["group", "rank", "rank"] if layout.ranks > 1 else ["group"])]
        moments = [("in a save", saving), ("at the start", starting(random.uniform(0, 0.95)))]
        moments += [("in steps", stepping(random.randint(1, 3), random.uniform(0, 0.3))) for _ in range(size)]
        moments = moments[:size]
        random.shuffle(moments)
        faults = []
        for name, moment in moments:
            victim = random.choice(whom)
            faults.append(Fault(moment, kill(victim), f"kill -9 of {victim} {name}"))
        made.append((layout, faults))
    return _chains(made)


def signals(count: int, random) -> list[tuple[Layout, Callable[[Trial], None]]]:
    """SIGTERM and SIGUSR1, a quarter each at the start and between a pipeline's stages."""
    quarter = count // 4
    starts = [("at once", None), ("importing", importing), ("building the model", building), ("reading", reading)]
    starts.append(("somewhere at the start", starting(random.uniform(0.1, 0.95))))
    between = [("between stages", between_stages(number % 3, random.uniform(0, 0.5))) for number in range(quarter)]
    running = [
        (f"in {name}", moment)
        for name, moment in [
            ("a step", stepping(random.randint(1, 3), random.uniform(0, 0.3))),
            ("a save", saving),
            ("an evaluation", evaluating(random.uniform(0.1, 0.4))),
            ("a step", stepping(random.randint(1, 3), random.uniform(0, 0.3))),
            ("a save", saving),
        ]
    ]

    def faults(moments: list[tuple], whom: str) -> list[Fault]:
        made = []
        for name, moment in moments:
            number = random.choice([signal.SIGTERM, signal.SIGUSR1])
            label = f"{number.name} to the {whom} {name}"
            if moment is None:
                made.append(Fault(lambda trial, start: later(start, 0.02), send_at_once(number), label))
            else:
                made.append(Fault(moment, send(number, whom), label))
        return made

    plans = []
    rest = count - 2 * quarter
    for number, size in enumerate(_shares(rest, 5)):
        layout, whom = [(LONE, "group"), (TENSOR, "process"), (ZERO, "process")][number % 3]
        plans.append((layout, faults(running[:size], whom)))
    for number, size in enumerate(_shares(quarter, 5)):
        first = ("in a step", stepping(3, 0.0))  # so that there is a checkpoint to read
        plans.append(([TENSOR, LONE][number % 2], faults([first, *starts[:size]], "process")))
    plans += [(PIPELINE, faults(between[at : at + 3], "process")) for at in range(0, quarter, 3)]
    return _chains(plans)


def interrupts(count: int, random) -> list[tuple[Layout, Callable[[Trial], None]]]:
    """^C on a terminal, once or twice."""
    made = []
    for number, size in enumerate(_shares(count, 5)):
        faults = []
        for at in range(size):
            twice = (number + at) % 2 == 1
            moment = stepping(random.randint(1, 2), random.uniform(0, 0.2))
            inject, name = (interrupt_twice, "^C twice") if twice else (interrupt_once, "^C")
            faults.append(Fault(moment, inject, f"{name} in steps", terminal=True))
        made.append(([TENSOR, ZERO][number % 2], faults))
    return _chains(made)


def _shares(count: int, size: int) -> list[int]:
    return [min(size, count - at) for at in range(0, count, size)]


def _chains(plans: list[tuple[Layout, list[Fault]]]) -> list[tuple[Layout, Callable[[Trial], None]]]:
    return [(layout, lambda trial, faults=faults: chain(trial, faults)) for layout, faults in plans]
