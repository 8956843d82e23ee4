"""A stage of a pipeline that makes data: its command runs in a process beside the first rank, while all ranks wait.

The command starts workers of its own, as it does alone, and its memory is free again when it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omni_train import platform, stopping
from omni_train.checkpoint.integrity import DIGESTS
from omni_train.checkpoint.store import resolve
from omni_train.data_pipelines.making import write_json
from omni_train.errors import UserError, about, cannot_write
from omni_train.platform import failures
from omni_train.platform.agreement import on_first_rank, wait_on
from omni_train.platform.logs import say
from omni_train.recipe.data_stage import DataStage
from omni_train.training.beside import call_beside
from omni_train.training.run_lock import RunLock

RECORD = "made_by.json"
"""Name of the file in the folder of a stage's data that says that they are complete, and what they were made of."""


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
    with platform.joined():
        failures.listen()
        with failures.told(), about(name):
            lock.check()
            on_first_rank(lambda: _make(stage))


def is_made(stage: DataStage) -> bool:
    """Whether the data of a stage are complete, and were made by the same command of the same inputs."""
    try:
        return json.loads((Path(stage.out) / RECORD).read_text()) == _origin(stage)
    except (OSError, ValueError):
        return False


def _make(stage: DataStage) -> None:
    origin = _origin(stage)
    call_beside(stage.function, stage.arguments(), str(stage), wait_on)
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
