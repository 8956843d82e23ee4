"""A step whose evaluation a signal cut off: its metrics are kept, and logged whole by the next start."""

from __future__ import annotations

import json
from pathlib import Path

from omni_train import platform
from omni_train.platform.agreement import on_first_rank
from omni_train.platform.logs import warn


class UnloggedStep:
    """The metrics of one step in a file of the run's directory, there until they are logged."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "unlogged_step.json"

    def exists(self) -> bool:
        """Whether the run has a step that is still to be evaluated and logged."""
        return self.path.exists()

    def keep(self, metrics: dict[str, float]) -> None:
        """Write the metrics of a step; the first rank does it."""
        if platform.rank() == 0:
            try:
                self.path.write_text(json.dumps(metrics))
            except OSError as error:
                warn(f"{self.path}: cannot be written: {error.strerror}; step {metrics['step']} will not be logged")

    def read(self, step: int) -> dict[str, float] | None:
        """Metrics of a step, None where those of that step are not kept. Collective."""
        return on_first_rank(lambda: self._read(step))

    def _read(self, step: int) -> dict[str, float] | None:
        if not self.exists():
            return None
        try:
            metrics = json.loads(self.path.read_text())
        except ValueError:
            return None  # a crash cut the file short
        return metrics if metrics["step"] == step else None

    def forget(self) -> None:
        """Remove the file: its metrics are logged, or of a step that the run no longer has."""
        if platform.rank() == 0:
            self.path.unlink(missing_ok=True)
