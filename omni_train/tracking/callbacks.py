"""What watches a run: the metrics file, wandb, and the progress bar. Only rank 0 has any."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from dataclasses import asdict
from pathlib import Path

from omni_train import lines
from omni_train.data.samples.sample import MEDIA, Medium
from omni_train.errors import UserError, cannot_write, first_line
from omni_train.evaluation.answers import Prediction
from omni_train.evaluation.resynthesis import Resynthesis
from omni_train.platform.logs import say, warn
from omni_train.recipe.schema import Recipe, WandbMode
from omni_train.tracking.step_log import read_lines


class Callback:
    """Sees every logged step and evaluation."""

    def on_metrics(self, metrics: dict[str, float]) -> None:
        """A step was logged; `metrics` has ``step`` and the figures of that step."""

    def on_predictions(self, step: int, predictions: list[Prediction]) -> None:
        """Some of the answers to held-out questions after `step`; the metrics of the same step come later."""

    def on_resyntheses(self, step: int, resyntheses: list[Resynthesis]) -> None:
        """Some of the held-out speech that the codec said again after `step`; metrics of the same step come later."""

    def close(self) -> None:
        """The run ends."""


class MetricsFile(Callback):
    """One JSON object per logged step. What came after the checkpoint a run resumes from is dropped.

    Steps that cannot be written, on a full disk say, are kept until they can.

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
            self._file = path.open("ab", buffering=0)  # what is written of a line that fails is known
        except OSError as error:
            raise cannot_write(path, error) from error

    def on_metrics(self, metrics: dict[str, float]) -> None:
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

    def on_predictions(self, step: int, predictions: list[Prediction]) -> None:
        self._call("on_predictions", step, predictions)

    def on_resyntheses(self, step: int, resyntheses: list[Resynthesis]) -> None:
        self._call("on_resyntheses", step, resyntheses)

    def close(self) -> None:
        self._call("close")


class Wandb(Callback):
    """A wandb run, resumed under the same id when the run is."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))  # tables with media, until they are sent
        import wandb

        self._wandb, self._media = wandb, directory / "questions"
        identity = directory / "wandb_id"
        try:
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
            self._run = wandb.init(
                mode=recipe.tracking.mode.value,
                project=recipe.tracking.project,
                entity=recipe.tracking.entity,
                tags=list(recipe.tracking.tags),
                name=recipe.run,
                id=identity.read_text().strip(),
                resume="allow",
                dir=str(directory),
                config=asdict(recipe),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking: wandb refuses: {first_line(error)}; log in, or choose tracking=wandb_offline"
            ) from error
        except OSError as error:
            raise cannot_write(directory, error) from error

    def on_metrics(self, metrics: dict[str, float]) -> None:
        self._run.log({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))

    def on_predictions(self, step: int, predictions: list[Prediction]) -> None:
        """A table of questions beside the first of each kind of their media, which are kept as files of the run."""
        columns = ["name", "task", *MEDIA, "question", "expected", "answer"]
        table = self._wandb.Table(columns=columns, allow_mixed_types=True)
        for prediction in predictions:
            asked = prediction.question
            media = {medium.kind: self._medium(asked.name, medium, data) for medium, data in reversed(asked.media)}
            shown = [media.get(kind) for kind in MEDIA]
            table.add_data(asked.name, asked.meta.get("task"), *shown, asked.text, asked.answer, prediction.answer)
        self._run.log({"predictions": table}, step=step)

    def on_resyntheses(self, step: int, resyntheses: list[Resynthesis]) -> None:
        """A table of originals beside their resyntheses, to hear and to see."""
        table = self._wandb.Table(columns=["name", "text", "original", "resynthesis", "spectrograms"])
        for pair in resyntheses:
            sounds = [self._wandb.Audio(str(file)) for file in (pair.original, pair.resynthesis)]
            table.add_data(pair.name, pair.text, *sounds, self._wandb.Image(str(pair.spectrograms)))
        self._run.log({"resyntheses": table}, step=step)

    def _medium(self, name: str, medium: Medium, data: bytes):
        path = self._media / name / Path(medium.file).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        kind = {"audio": self._wandb.Audio, "image": self._wandb.Image, "video": self._wandb.Video}[medium.kind]
        return kind(str(path)) if medium.kind != "video" or path.suffix in (".mp4", ".webm") else None

    def close(self) -> None:
        self._run.finish()


_FIGURES = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "grad_norm": "grad {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "tflops_per_second": "{:.3g} TFLOP/s",
    "mfu": "MFU {:.1%}",
}
"""What of a step's metrics the progress shows, in order, and how."""


class Progress(Callback):
    """A bar with loss, tokens/s, TFLOP/s, utilisation and the time left; plain lines where there is no terminal."""

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
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, figures="")
            self._bar.start()

    def on_metrics(self, metrics: dict[str, float]) -> None:
        shown = [text.format(metrics[name]) for name, text in _FIGURES.items() if name in metrics]
        step = int(metrics["step"])
        if self._live:
            self._bar.update(self._task, completed=step, figures="  ".join(shown))
        else:
            left = metrics.get("eta_seconds")
            end = f"  {left / 60:.0f} min left" if left is not None else ""
            lines.write(f"step {step}/{self._total}  " + "  ".join(shown) + end)

    def on_predictions(self, step: int, predictions: list[Prediction]) -> None:
        for prediction in predictions:
            asked = prediction.question
            media = " ".join(f"<{medium.kind}>" for medium, _ in asked.media)
            self._show(f"  {asked.name}  {media} {asked.text!r} -> {prediction.answer!r} (expected {asked.answer!r})")

    def on_resyntheses(self, step: int, resyntheses: list[Resynthesis]) -> None:
        for pair in resyntheses:
            self._show(f"  {pair.name}  {pair.text!r} -> {pair.resynthesis}")

    def _show(self, line: str) -> None:
        """Above the bar, if there is one."""
        if self._live:
            self._console.print(line, highlight=False, markup=False)
        else:
            lines.write(line)

    def close(self) -> None:
        if self._live:
            self._bar.stop()


def build_callbacks(recipe: Recipe, directory: Path, resume_step: int) -> list[Callback]:
    """The recipe's callbacks, for rank 0."""
    callbacks: list[Callback] = [MetricsFile(directory / "metrics.jsonl", resume_step)]
    if recipe.tracking.mode is not WandbMode.disabled:
        callbacks.append(Spared(Wandb(recipe, directory)))
    callbacks.append(Spared(Progress(recipe.schedule.steps, resume_step)))
    return callbacks
