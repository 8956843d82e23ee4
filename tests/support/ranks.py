"""A program for the launcher to run: ``python -m tests.support.ranks BEHAVIOUR FOLDER``; each rank writes a file."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from omni_train.errors import UserError, announce
from omni_train.processes import die_with_parent


def main(behaviour: str, folder: str) -> int:
    rank = int(os.environ["RANK"])
    mark = Path(folder, f"rank{rank}")
    die_with_parent()
    if behaviour == "user_error":
        announce(UserError("parallel.tensor=3: no"))
        return 2
    if behaviour == "wait_for_signal":
        received = []
        signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
        mark.write_text(str(os.getpid()))
        while not received:
            time.sleep(0.05)
        mark.write_text("saved")
        return 0
    if behaviour == "sleep":
        partial = mark.with_suffix(".partial")
        partial.write_text(str(os.getpid()))
        partial.rename(mark)
        time.sleep(600)
    return 0 if behaviour == "succeed" else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
