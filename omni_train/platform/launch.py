"""One command on N processes of this machine: torchrun, with the manners of a single process.

Torchrun as it is would hide a user's one-line error under pages of its own, always exit 1, and kill the ranks 30 s
after a SIGTERM, which a large checkpoint outlasts. Here the first failing rank's exit code is the launcher's, signals
are passed on and the ranks decide when to end, and ranks do not outlive a launcher that is killed.

``python -m omni_train.platform.launch N train stage=…`` runs ``omni-train train stage=…`` on N processes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import psutil
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from omni_train.processes import Exit

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)

_USAGE = "usage: launchers/local.sh N COMMAND …, N being a number of processes, at least 1"


def main(arguments: list[str]) -> int:
    """``N COMMAND …`` as typed after ``launchers/local.sh``; returns the exit code."""
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        print(_USAGE, file=sys.stderr)
        return 2
    return launch(int(arguments[0]), "omni_train", arguments[1:])


def launch(count: int, module: str, arguments: list[str]) -> int:
    """Run ``python -m module *arguments`` on ``count`` ranks and return the exit code.

    That is 0 when all ranks exit 0, else the code of the first rank that failed (128 + signal number if it was killed).
    The other ranks are then sent SIGTERM, and 30 s later SIGKILL.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    for number in FORWARDED:
        signal.signal(number, _forward)
    signal.signal(signal.SIGINT, _leave_to_the_ranks)
    options = torchrun.parse_args(
        # Torchrun insists on handling some signal; this one is nobody else's.
        ["--standalone", f"--nproc-per-node={count}", "--signals-to-handle=SIGQUIT", "-m", module, *arguments]
    )
    # Of all that torchrun has to say about a failing rank, the line printed below is what the rank has not said itself.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (Exit.wrong, Exit.stopped):  # of which the rank has said why
            return failure.exitcode
        print(f"rank {rank} {_ending(failure.exitcode)}; the other ranks were stopped", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _forward(number: int, _frame: object) -> None:
    ranks = psutil.Process().children()
    if not ranks:  # not started yet
        sys.exit(128 + number)
    for rank in ranks:
        rank.send_signal(number)


def _leave_to_the_ranks(_number: int, _frame: object) -> None:
    """A terminal sends Ctrl-C to the ranks too: wait for how they end."""


def _ending(exit_code: int) -> str:
    return f"exited with code {exit_code}" if exit_code > 0 else f"was killed by {signal.Signals(-exit_code).name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
