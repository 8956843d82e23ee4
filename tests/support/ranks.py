"""A program for the launcher to run: ``python -m tests.support.ranks BEHAVIOUR FOLDER``; each rank writes a file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from omni_train import stopping
from omni_train.errors import UserError, announce
from omni_train.processes import Exit, die_with_parent


def main(behaviour: str, folder: str) -> int:
    rank = os.environ.get("RANK", "0")
    if "OMNI_TRAIN_LAUNCHER" in os.environ:
        die_with_parent(int(os.environ["OMNI_TRAIN_LAUNCHER"]))
    mark = Path(folder, f"rank{rank}")

    def say_that_it_runs() -> None:
        partial = mark.with_suffix(".partial")
        partial.write_text(str(os.getpid()))
        partial.rename(mark)

    match behaviour:
        case "succeed":
            return 0
        case "tell":
            mark.write_text(json.dumps(dict(os.environ)))
            return 0
        case "user_error":
            announce(UserError("parallel.tensor=3: no"))
            return 2
        case "sleep":
            stopping.let_go()
            say_that_it_runs()
            time.sleep(600)
        case "start":  # the slow imports of a start, and then the first step
            say_that_it_runs()
            wait_for(Path(folder, "heed"))
            stopping.listen()
            time.sleep(600)
        case "train":
            stopping.listen()
            stopping.finish_first("finishing step 1 and saving")
            say_that_it_runs()
            while not stopping.asked():
                time.sleep(0.02)
            time.sleep(0.5)  # in which a signal could come twice
            mark.write_text("saved")
            return Exit.stopped
        case "hang":  # as in a collective, which comes back to no handler
            stopping.listen()
            stopping.finish_first("finishing step 1 and saving")
            say_that_it_runs()
            time.sleep(600)
            while True:
                time.sleep(600)
        case "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
            say_that_it_runs()
            time.sleep(600)
    return 1


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
