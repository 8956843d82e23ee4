"""Callbacks that follow a run. Only rank 0 has any."""

from __future__ import annotations

from collections.abc import Sequence

from omni_train.evaluation.base import Exhibit
from omni_train.platform.logs import warn


class Callback:
    """Follower of a run: it is called with every logged step and the exhibits of every evaluation."""

    def on_metrics(self, metrics: dict[str, float]) -> None:
        """Hook for the metrics of a logged step, ``step`` among them."""

    def on_exhibits(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """Hook for exhibits of the evaluation after a step; the metrics of that step come after them."""

    def close(self) -> None:
        """Hook for the end of the run."""


class Spared(Callback):
    """Wrapper of a callback that a run can do without: that its files cannot be written is a warning, given once."""

    def __init__(self, callback: Callback) -> None:
        self._callback, self._failed = callback, False

    def _call(self, method: str, *args) -> None:
        try:
            getattr(self._callback, method)(*args)
        except OSError as error:
            if not self._failed:
                warn(f"{type(self._callback).__name__}: not everything can be written: {error}")
            self._failed = True

    def on_metrics(self, metrics: dict[str, float]) -> None:
        self._call("on_metrics", metrics)

    def on_exhibits(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        self._call("on_exhibits", step, exhibits)

    def close(self) -> None:
        self._call("close")
