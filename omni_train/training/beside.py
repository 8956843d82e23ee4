"""A function called in a process beside this one, which it never outlives. Imports nothing heavy: the process does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from omni_train import lines, stopping
from omni_train.errors import RunFailed, UserError

POLL_SECONDS = 1.0
_PATIENCE = 1.0  # seconds in which a signal that ended the process, as it went to the whole job, ends this one too
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # what else a launcher sets says nothing alone


def call_beside(
    function: Callable[..., Any], arguments: Mapping[str, Any], what: str, waiting: Callable[[], None]
) -> None:
    """Call a function in a new process that is no rank, and wait for it.

    The process and those that it starts are ended before a signal ends this one at once, and when this one is killed.

    Args:
        function: importable by name.
        arguments: of the function, picklable.
        what: what is called, for the message should the process crash.
        waiting: called every ``POLL_SECONDS`` meanwhile.

    Raises:
        UserError: the function raised it; a ``RunFailed`` where its process was killed or crashed.
    """
    ours, theirs = multiprocessing.Pipe()
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from omni_train.processes import die_with_parent; die_with_parent({os.getpid()})\n"
        f"from omni_train.training.beside import work; work({theirs.fileno()})"
    )
    process = subprocess.Popen(
        # When it is killed, what tracks its semaphores would say so behind the last line of the run.
        [sys.executable, "-W", "ignore:resource_tracker:UserWarning", "-c", program],
        env={key: value for key, value in os.environ.items() if key not in _OF_A_RANK},
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # a group of its own, and a terminal's Ctrl-C is for the ranks
    )
    theirs.close()

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    stopping.end_too(end)
    try:
        ours.send((function, dict(arguments)))
        while not ours.poll(POLL_SECONDS):
            waiting()
        error = ours.recv()
        process.wait()
    except (EOFError, ConnectionError):
        code = process.wait()
        how = (
            f"exited with code {code}, as is said above" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        )
        error = RunFailed(f"`{what}` {how}; the same command goes on from here")
    finally:
        end()
        process.wait()
        ours.close()
    if error is not None:
        time.sleep(_PATIENCE)
        raise error


def work(descriptor: int) -> None:
    """Call the function that the other end of a connection sends, and send back the ``UserError`` that it raised."""
    lines.begin_log()
    end, error = Connection(descriptor), None
    function, arguments = end.recv()
    try:
        function(**arguments)
    except UserError as raised:
        error = raised
    sys.stdout.flush()
    end.send(error)
