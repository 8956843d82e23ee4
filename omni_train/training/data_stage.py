"""A stage of a pipeline that makes data: its command runs in a process beside the first rank, and all ranks wait.

The process is none of the ranks: the command starts workers of its own as it would alone, it has none of the launcher's
environment, and its memory is free again when it ends. It ends with the first rank, however that ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import connection
from pathlib import Path
from typing import Any

from omni_train import lines, platform, stopping
from omni_train.checkpoint.integrity import DIGESTS
from omni_train.checkpoint.store import resolve
from omni_train.data import transfer
from omni_train.data_pipelines.making import write_json
from omni_train.errors import RunFailed, UserError, about, cannot_write
from omni_train.platform import failures
from omni_train.platform.agreement import on_first_rank, wait_on
from omni_train.platform.logs import say
from omni_train.recipe.data_stage import DataStage
from omni_train.training.run_lock import RunLock

RECORD = "made_by.json"
"""Name of the file in the folder of a stage's data that says that they are complete, and what they were made of."""

_POLL_SECONDS = 1.0  # the other ranks wait in collectives, which have time limits
_PATIENCE = 1.0  # seconds in which a signal that ended the process, as it went to the whole job, ends this rank too
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # TORCHELASTIC_… says nothing without them


def make_data(stage: DataStage, name: str, title: str, lock: RunLock) -> None:
    """Run the command of a stage, unless its data are complete and of the same inputs. Collective; joins the ranks.

    Whether data of other inputs can be gone on with is for the command to say.

    Args:
        stage: names checkpoints, not runs.
        name: name of the stage.
        title: name of the stage in log lines.
        lock: lock of the pipeline.

    Raises:
        UserError: on all ranks, as the command raises it; a ``RunFailed`` where it crashed.
    """
    if is_made(stage):
        say(f"{title}: complete, skipped")
        return
    say(f"{title}: {stage}")
    stopping.at_once(f"in {title}")
    platform.init_distributed()
    failures.listen()
    try:
        with failures.told(), about(name):
            lock.check()
            on_first_rank(lambda: _make(stage))
    finally:
        platform.leave_distributed()


def is_made(stage: DataStage) -> bool:
    """Whether the data of a stage are complete, and were made by the same command of the same inputs."""
    try:
        return json.loads((Path(stage.out) / RECORD).read_text()) == _origin(stage)
    except (OSError, ValueError):
        return False


def _make(stage: DataStage) -> None:
    origin = _origin(stage)
    _run(stage)
    try:
        write_json(Path(stage.out) / RECORD, origin)
    except OSError as error:
        raise cannot_write(stage.out, error) from error


def _origin(stage: DataStage) -> dict[str, Any]:
    contents = {key: content for key, value in stage.words.items() if key != "out" and (content := _content(value))}
    return {"command": stage.command, "words": dict(stage.words), "contents": contents}


def _content(path: str) -> str | None:
    """What changes with the content of a checkpoint, a folder of shards or a file; None of anything else."""
    try:
        index = Path(path) / ".nv-meta" / "index.uuid"
        if Path(path).is_file():
            found = os.stat(path)
            return f"{found.st_size} bytes of {found.st_mtime_ns}"
        summary = index if index.exists() else resolve(path) / DIGESTS
        return hashlib.sha256(summary.read_bytes()).hexdigest()
    except (UserError, OSError, ValueError):
        return None


def _run(stage: DataStage) -> None:
    """Run the command in a process of its own, and wait for it.

    Raises:
        UserError: as the command raises it.
    """
    ours, theirs = transfer.channel()
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from omni_train.processes import die_with_parent; die_with_parent({os.getpid()})\n"
        f"from omni_train.training.data_stage import work; work({theirs.fileno()})"
    )
    process = subprocess.Popen(
        # When it is killed, what tracks its semaphores would say so behind the last line of the run.
        [sys.executable, "-W", "ignore:resource_tracker:UserWarning", "-c", program],
        env={key: value for key, value in os.environ.items() if key not in _OF_A_RANK},
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # a terminal's Ctrl-C is for the ranks
    )
    theirs.close()
    try:
        transfer.send(ours, (stage.function, stage.arguments()))
        while not connection.wait([ours], _POLL_SECONDS):
            wait_on()
        error, _ = transfer.receive(ours)
        process.wait()
    except (EOFError, OSError):
        ours.close()
        code = process.wait()
        how = (
            f"exited with code {code}, as is said above" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        )
        error = RunFailed(f"`{stage}` {how}; the same command goes on from here")
    finally:
        process.kill()
        process.wait()
        ours.close()
    if error is not None:
        time.sleep(_PATIENCE)
        raise error


def work(descriptor: int) -> None:
    """Run a command in this process, and tell its end to the process at the other end of a channel."""
    lines.begin_log()
    end, error = socket.socket(fileno=descriptor), None
    (function, arguments), _ = transfer.receive(end)
    try:
        function(**arguments)
    except UserError as raised:
        error = raised
    sys.stdout.flush()
    transfer.send(end, error)
