"""How a run went, as a table: ``python -m omni_train.training.report runs/smoke``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from omni_train.errors import UserError

COLUMNS = {
    "step": "{:,}",
    "tokens": "{:,.0f}",
    "loss": "{:.4f}",
    "grad_norm": "{:.3f}",
    "lr": "{:.2e}",
    "tokens_per_second": "{:,.0f}",
}
"""Keys of ``metrics.jsonl`` that are shown, in order, and how."""


def read_steps(run: Path) -> list[dict]:
    """The logged training steps of a run directory, oldest first.

    Raises:
        UserError: the run has logged no step.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the directory of a run") from error
    steps = [row for row in map(json.loads, lines) if "loss" in row]
    if not steps:
        raise UserError(f"{path} has no training step yet")
    return steps


def table(steps: list[dict], rows: int = 12) -> Table:
    """At most ``rows`` steps, evenly spaced, the first and the last among them."""
    last = len(steps) - 1
    shown = sorted({round(i * last / max(1, rows - 1)) for i in range(rows)})
    result = Table(title=f"loss {steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f} in {steps[-1]['step']:,} steps")
    for name in COLUMNS:
        result.add_column(name.replace("_per_", "/").replace("_", " "), justify="right")
    for step in (steps[i] for i in shown):
        result.add_row(*(form.format(step[name]) if name in step else "–" for name, form in COLUMNS.items()))
    return result


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m omni_train.training.report RUN_DIRECTORY", file=sys.stderr)
        return 2
    try:
        steps = read_steps(Path(arguments[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    Console().print(table(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
