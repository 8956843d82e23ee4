"""Progress of a job that is started again and again: its starts, and the checkpoints in between."""

from __future__ import annotations

import json
import os
from pathlib import Path

from omni_train.errors import UserError


class Starts:
    """Counter of the starts of a job, kept in a small file in its run's directory; making one counts a start.

    Args:
        directory: directory of a run, or of a pipeline; created where it is missing.
        job: id of the job.

    Attributes:
        idle: number of starts in a row without a newer checkpoint, this one included.

    Raises:
        UserError: the directory cannot be written.
    """

    def __init__(self, directory: Path, job: str) -> None:
        self._directory, self._file = directory, directory / f"slurm-{job}.json"
        try:
            before = json.loads(self._file.read_text()) if self._file.exists() else {"steps": 0, "idle": 0}
            directory.mkdir(parents=True, exist_ok=True)
            self._steps, self.idle = before["steps"], before["idle"]
            self.look()  # the start before may have ended without counting its checkpoints
            self.idle += 1
            self._write()
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; must be writable, or give runs_dir=") from error

    def look(self) -> int:
        """Number of starts in a row without a newer checkpoint, now: 0 once there is one."""
        if (now := steps(self._directory)) > self._steps:
            self._steps, self.idle = now, 0
            self._write()
        return self.idle

    def forget(self) -> None:
        """Delete the file, as the job will not start again."""
        self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps({"steps": self._steps, "idle": self.idle}))
        os.replace(partial, self._file)


def steps(directory: Path) -> int:
    """Steps of the newest complete checkpoint of a run, or summed over all runs of a pipeline."""
    newest: dict[Path, int] = {}
    for pattern in ("checkpoints", "*/checkpoints"):
        for file in directory.glob(f"{pattern}/step_*/metadata.json"):
            step = file.parent.name.removeprefix("step_")
            if step.isdecimal():
                newest[file.parents[1]] = max(newest.get(file.parents[1], 0), int(step))
    return sum(newest.values())
