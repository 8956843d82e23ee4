"""Writer of ``metrics.jsonl``: a line for every logged step, kept through a full disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_train.errors import cannot_write
from omni_train.platform.logs import say, warn
from omni_train.tracking.base import Callback
from omni_train.tracking.step_log import read_lines


class MetricsFile(Callback):
    """Callback that writes one JSON object per logged step.

    Steps that cannot be written, on a full disk say, are kept until they can.

    Args:
        path: the file, which may exist.
        resume_step: steps done by the checkpoint that the run resumes from; lines of later steps are dropped.

    Raises:
        UserError: the file cannot be written when it is opened.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path, self._unwritten, self._failing = path, b"", False
        try:
            kept = [line + b"\n" for line, step in read_lines(path) if step["step"] <= resume_step]
            fresh = path.with_suffix(".new")
            fresh.write_bytes(b"".join(kept))
            os.replace(fresh, path)
            self._file = path.open("ab", buffering=0)  # unbuffered: how much of a line was written is known
        except OSError as error:
            raise cannot_write(path, error) from error

    def on_metrics(self, metrics: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._unwritten += json.dumps(finite).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._failing:
                warn(f"{self._path}: cannot be written, kept until it can: {error.strerror}")
            self._failing = True
            return
        if self._failing:
            say(f"{self._path}: written again, nothing is missing")
        self._failing = False

    def close(self) -> None:
        self._write()
        if self._unwritten:
            warn(f"{self._path}: its last {self._unwritten.count(10)} lines could not be written and are lost")
        with contextlib.suppress(OSError):
            self._file.close()
