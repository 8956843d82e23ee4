"""Progress of a run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from omni_train import lines
from omni_train.evaluation.base import Exhibit
from omni_train.tracking.base import Callback

_SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "tflops_per_second": "{:.3g} TFLOP/s",
    "mfu": "MFU {:.1%}",
}
"""Metrics of a step that the progress shows, in order, with their formats."""


class Progress(Callback):
    """Progress bar with loss, tokens/s, TFLOP/s, utilisation and the time left; plain lines without a terminal.

    Args:
        total: steps of the run.
        done: steps done before.
    """

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._total = total
        if self._live:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, metrics="")
            self._bar.start()

    def on_metrics(self, metrics: dict[str, float]) -> None:
        shown = [text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics]
        step = int(metrics["step"])
        if self._live:
            self._bar.update(self._task, completed=step, metrics="  ".join(shown))
        else:
            left = metrics.get("eta_seconds")
            end = f"  {left / 60:.0f} min left" if left is not None else ""
            lines.write(f"step {step}/{self._total}  " + "  ".join(shown) + end)

    def on_exhibits(self, step: int, exhibits: Sequence[Exhibit]) -> None:
        for exhibit in exhibits:
            self._show(f"  {exhibit.line()}")

    def _show(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._live:
            self._console.print(line, highlight=False, markup=False)
        else:
            lines.write(line)

    def close(self) -> None:
        if self._live:
            self._bar.stop()
