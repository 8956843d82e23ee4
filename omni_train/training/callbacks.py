"""What watches a run: the metrics file, wandb, and the progress bar. Only rank 0 has any."""

from __future__ import annotations

import json
import math
import os
import secrets
from dataclasses import asdict
from pathlib import Path

from omni_train.data.sample import MEDIA, Medium
from omni_train.errors import UserError, first_line
from omni_train.recipe.schema import Recipe, WandbMode
from omni_train.training.codec_evaluation import Resynthesis
from omni_train.training.evaluation import Prediction


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
    """One JSON object per logged step. What came after the checkpoint a run resumes from is dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:
                    pass  # the line that a crash cut short
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(kept))
        os.replace(fresh, path)
        self._file = path.open("a")

    def on_metrics(self, metrics: dict[str, float]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Wandb(Callback):
    """A wandb run, resumed under the same id when the run is."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))  # tables with media, until they are sent
        import wandb

        self._wandb, self._media = wandb, directory / "questions"
        identity = directory / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        try:
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
            self._console.print(f"step {step}/{self._total}  " + "  ".join(shown) + end, highlight=False)

    def on_predictions(self, step: int, predictions: list[Prediction]) -> None:
        for prediction in predictions:
            asked = prediction.question
            media = " ".join(f"<{medium.kind}>" for medium, _ in asked.media)
            line = f"  {asked.name}  {media} {asked.text!r} -> {prediction.answer!r} (expected {asked.answer!r})"
            self._console.print(line, highlight=False, markup=False)

    def on_resyntheses(self, step: int, resyntheses: list[Resynthesis]) -> None:
        for pair in resyntheses:
            self._console.print(f"  {pair.name}  {pair.text!r} -> {pair.resynthesis}", highlight=False, markup=False)

    def close(self) -> None:
        if self._live:
            self._bar.stop()


def build_callbacks(recipe: Recipe, directory: Path, resume_step: int) -> list[Callback]:
    """The recipe's callbacks, for rank 0."""
    callbacks: list[Callback] = [MetricsFile(directory / "metrics.jsonl", resume_step)]
    if recipe.tracking.mode is not WandbMode.disabled:
        callbacks.append(Wandb(recipe, directory))
    callbacks.append(Progress(recipe.schedule.steps, resume_step))
    return callbacks
