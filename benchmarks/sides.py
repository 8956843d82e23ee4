"""Sides of a comparison, each in a process of its own, which take turns.

Megatron's CPU emulation slows every torch call of its process; and a busy machine slows all sides.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Side = Callable[[Path], Callable[[str], float]]
"""(a folder that all sides share) -> function that takes a step of a kind and returns its loss."""


@contextlib.contextmanager
def processes(sides: Mapping[str, Side], threads: int) -> Iterator[dict[str, Connection]]:
    """Processes of the sides, by name. Each has been built before the next one is started."""
    context = multiprocessing.get_context("spawn")
    connections: dict[str, Connection] = {}
    started = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, side in sides.items():
                connections[name], child = context.Pipe()
                # Not daemons: saving a checkpoint starts processes of its own.
                started.append(context.Process(target=_serve, args=(side, Path(folder), threads, child)))
                started[-1].start()
                child.close()
                connections[name].recv()
            yield connections
        finally:
            for connection in connections.values():
                connection.close()
            for process in started:
                process.join()


def take_turns(
    connections: Mapping[str, Connection], turns: Sequence[tuple[str, str]], repeats: int
) -> tuple[list[float], list[list[float]]]:
    """Median seconds of each turn, and the losses of all of them in every round.

    Args:
        connections: from :func:`processes`.
        turns: (side, kind of step) in the order of a round.
        repeats: rounds that are measured, after one that warms up.
    """
    seconds: list[list[float]] = []
    losses: list[list[float]] = []
    for _ in range(1 + repeats):
        found = []
        for side, kind in turns:
            connections[side].send(kind)
            found.append(connections[side].recv())
        losses.append([loss for loss, _ in found])
        seconds.append([elapsed for _, elapsed in found])
    return [statistics.median(times) for times in zip(*seconds[1:], strict=True)], losses


def _serve(side: Side, folder: Path, threads: int, connection: Connection) -> None:
    """Run the process of one side: for every kind of step asked for, take one and send its loss and seconds."""
    torch.set_num_threads(threads)
    step = side(folder)
    connection.send("ready")
    while True:
        try:
            kind = connection.recv()
        except EOFError:  # the other end was closed: done
            return
        start = time.perf_counter()
        loss = step(kind)
        connection.send((loss, time.perf_counter() - start))
