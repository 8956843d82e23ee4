"""What watches a run. Only rank 0 has any of these."""

from __future__ import annotations

from collections.abc import Sequence

from omni_train.evaluation.base import Exhibit
from omni_train.platform.logs import warn


class Callback:
    """Sees every logged step and evaluation."""

    def on_metrics(self, metrics: dict[str, float]) -> None:
        """A step was logged; `metrics` has ``step`` and what is known of that step."""

    def on_exhibits(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        """Some of what the evaluation after `step` asked and got; the metrics of the same step come later."""

    def close(self) -> None:
        """The run ends."""


class Spared(Callback):
    """A callback that a run can do without: where its files cannot be written, that is said once."""

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
