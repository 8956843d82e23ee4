"""Report of a run, or of a pipeline of runs: ``python -m omni_train.tracking.report runs/smoke``.

A run gives a table of its steps. A pipeline gives a table of its stages and one of its evaluations, which are also
written with curves into its ``report/``. Both give one of the schedules that a Talker spoke with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from omni_train.data.rows.batch import MODALITIES
from omni_train.errors import UserError
from omni_train.tracking.step_log import read_lines

COLUMNS = {
    "step": "{:,}",
    "tokens": "{:,.0f}",
    "loss": "{:.4f}",
    "grad_norm": "{:.3f}",
    "lr": "{:.2e}",
    "tokens_per_second": "{:,.0f}",
}
"""Keys of ``metrics.jsonl`` that are shown of a run, in order, with their formats."""

SPEECH = {
    "wer": "speech_wer",
    "cer": "speech_cer",
    "length ratio": "length_ratio",
    "ended": "ended_eos",
    "tokens before sound": "tokens_before_sound",
    "positions before sound": "positions_before_sound",
}
"""Columns of the table of schedules, and the held-out metrics in them, which may end in a schedule's name."""

Stages = Mapping[str, Sequence[Mapping[str, float]]]
"""Name -> logged steps of each stage of a pipeline, in order."""


def read_steps(run: Path) -> list[dict]:
    """Logged training steps of a run directory, oldest first.

    Raises:
        UserError: the run has logged no step.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: No such file or directory; expected the directory of a run")
    if not (steps := _steps(path)):
        raise UserError(f"{path} has no training step yet")
    return steps


def read_stages(pipeline: Path) -> Stages:
    """Logged training steps of the stages that have any, in the pipeline's order.

    Raises:
        UserError: no stage has logged a training step.
    """
    names = yaml.safe_load((pipeline / "pipeline.yaml").read_text())
    paths = {name: pipeline / name / "metrics.jsonl" for name in names}
    stages = {name: steps for name, path in paths.items() if path.exists() and (steps := _steps(path))}
    if not stages:
        raise UserError(f"{pipeline}: no stage has a training step yet")
    return stages


def _steps(path: Path) -> list[dict]:
    """Training steps of a ``metrics.jsonl``, without values that are no numbers.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        steps = [step for _, step in read_lines(path) if "loss" in step]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the file of a run") from error
    return [{key: value for key, value in step.items() if _is_metric(value)} for step in steps]


def _is_metric(value: object) -> bool:
    """Whether a logged value is a number: null stands for one that was not finite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def steps_table(steps: list[dict], rows: int = 12) -> Table:
    """Table of at most ``rows`` steps, evenly spaced, the first and the last among them."""
    last = len(steps) - 1
    shown = sorted({round(i * last / max(1, rows - 1)) for i in range(rows)})
    first, final = (_shown(step, "loss", "{:.3f}") for step in (steps[0], steps[-1]))
    title = f"loss {first} → {final} in {steps[-1]['step']:,} steps"
    header = [name.replace("_per_", "/").replace("_", " ") for name in COLUMNS]
    return _table(title, header, [[_shown(steps[i], name, form) for name, form in COLUMNS.items()] for i in shown])


def stages_cells(stages: Stages) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of stages: length and losses of each, those by modality or codebook as last logged,
    and the frames that a Talker's stage learned in a second.
    """
    last = {name: _last_values(steps) for name, steps in stages.items()}
    parts = {name: f"loss_{name}" for name in MODALITIES} | {"code 0": "loss_code0", "residual": "loss_residual"}
    columns = {name: (key, "{:.3f}") for name, key in parts.items()}
    columns["frames/s"] = "speech_frames_per_second", "{:,.0f}"
    columns = {name: shown for name, shown in columns.items() if any(shown[0] in values for values in last.values())}
    header = ["stage", "steps", "tokens", "first loss", "last loss", "held-out loss", *columns]
    rows = []
    shown = [("loss", "{:.3f}"), ("eval_loss", "{:.3f}"), *columns.values()]
    for name, steps in stages.items():
        cells = [f"{steps[-1]['step']:,}", _shown(last[name], "tokens", "{:,.0f}"), _shown(steps[0], "loss", "{:.3f}")]
        rows.append([name, *cells, *(_shown(last[name], *column) for column in shown)])
    return header, rows


def metrics_cells(stages: Stages) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of evaluations: each metric's name, and its value as each stage last logged it."""
    last = {name: _last_values(steps) for name, steps in stages.items()}
    keys = sorted({key for values in last.values() for key in values if key.startswith("eval_") and key != "eval_loss"})
    shown = [name for name, values in last.items() if any(key in values for key in keys)]
    rows = [
        [key.removeprefix("eval_").replace("_", " ")] + [_shown(last[name], key, "{:.3f}") for name in shown]
        for key in keys
    ]
    return ["held-out", *shown], rows


def schedules_cells(stages: Stages) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of held-out speech: what each stage last logged, for each schedule it spoke with."""
    rows, start = [], "eval_tokens_before_sound"
    for stage, steps in stages.items():
        values = _last_values(steps)
        for suffix in [key.removeprefix(start) for key in values if key.startswith(start)]:
            cells = [_shown(values, f"eval_{metric}{suffix}", "{:.3f}") for metric in SPEECH.values()]
            rows.append([stage, suffix.removeprefix("_") or "–", *cells])
    return ["stage", "schedule", *SPEECH], rows


def summary(rows: list[list[str]]) -> list[list[str]]:
    """Rows of :func:`metrics_cells`, without those of one language or codebook among several."""
    names = {row[0] for row in rows}

    def is_part(name: str) -> bool:
        """Whether a metric is of one language or codebook.

        Languages are named by two or three characters, codebooks by two; beside that of a language there is always the
        metric of all languages.
        """
        words = name.split()
        wholes = [" ".join(words[:at] + words[at + 1 :]) for at, word in enumerate(words) if len(word) in (2, 3)]
        return any(whole in names or whole.startswith("codebook") for whole in wholes)

    return [row for row in rows if not is_part(row[0])]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Ignore that nobody reads the output any more: the report is still written to a file."""
        self.quiet = True


def report(directory: Path, console: Console | None = None) -> None:
    """Print the report of a run or a pipeline; of a pipeline, also write ``report/report.md`` and its curves.

    Raises:
        UserError: the directory holds no logged training step.
    """
    console = console or _Console(width=None if sys.stdout.isatty() else 160)
    if not (directory / "pipeline.yaml").exists():
        steps = read_steps(directory)
        console.print(steps_table(steps))
        header, rows = schedules_cells({directory.name: steps})
        if rows:
            console.print(_table("Speech", header, rows))
        return
    from omni_train.tracking.curves import draw_losses

    stages = read_stages(directory)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    draw_losses(stages, folder / "losses.png")
    text = [f"# {directory.name}", "![losses](losses.png)"]
    tables = {"Stages": stages_cells(stages), "Evaluation": metrics_cells(stages), "Speech": schedules_cells(stages)}
    for title, (header, rows) in tables.items():
        if rows:
            console.print(_table(title, header, summary(rows) if title == "Evaluation" else rows))
            lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
            text += [f"## {title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    console.print(f"all metrics and curves: {folder / 'report.md'}")


def _last_values(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Last logged value of each metric: not every step logs all."""
    return {key: value for step in steps for key, value in step.items() if value is not None}


def _shown(values: Mapping[str, float], key: str, form: str) -> str:
    return form.format(values[key]) if key in values else "–"


def _table(title: str, header: list[str], rows: list[list[str]]) -> Table:
    result = Table(title=title)
    for name in header:
        result.add_column(name, justify="left" if name in ("stage", "held-out", "schedule") else "right")
    for row in rows:
        result.add_row(*row)
    return result


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m omni_train.tracking.report RUN_OR_PIPELINE_DIRECTORY", file=sys.stderr)
        return 2
    try:
        report(Path(arguments[0]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
