"""Callbacks of a run: the metrics file, wandb and the progress."""

from __future__ import annotations

from pathlib import Path

from omni_train.recipe.schema import Recipe, WandbMode
from omni_train.tracking.base import Callback, Spared
from omni_train.tracking.metrics_file import MetricsFile
from omni_train.tracking.progress import Progress
from omni_train.tracking.weights_and_biases import Wandb


def build_callbacks(recipe: Recipe, directory: Path, resume_step: int) -> list[Callback]:
    """Callbacks that the recipe asks for, on rank 0.

    Args:
        recipe: a validated recipe.
        directory: directory of the run.
        resume_step: steps done; what was logged after them is dropped.
    """
    callbacks: list[Callback] = [MetricsFile(directory / "metrics.jsonl", resume_step)]
    if recipe.tracking.mode is not WandbMode.disabled:
        callbacks.append(Spared(Wandb(recipe, directory)))
    callbacks.append(Spared(Progress(recipe.schedule.steps, resume_step)))
    return callbacks
