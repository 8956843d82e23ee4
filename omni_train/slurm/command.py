"""The command that a job runs on every rank: what it may be, and which directory it trains in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_train.errors import UserError

TASK = "%a"
"""In a job array, the number of the task; as in sbatch's names of files."""


def run_directory(command: Sequence[str], ranks: int | None) -> Path:
    """Compose and validate a command, and say where its run is.

    Args:
        command: ``train`` or ``pipeline`` and its words.
        ranks: that will run it; None where nobody knows yet.

    Raises:
        UserError: it is another command, has flags, or its recipe cannot be composed or cannot work.
    """
    name, words = command[0] if command else "", list(command[1:])
    if name not in ("train", "pipeline"):
        raise UserError(f"{name or 'no command'}: launchers/slurm.sh runs train and pipeline")
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(f"{flags[0]}: a command under SLURM has no flags; an array of jobs with run=NAME-{TASK} sweeps")
    if name == "pipeline":
        from omni_train.recipe.pipeline import load_pipeline

        return load_pipeline(words, ranks).directory
    from omni_train.recipe.compose import load_recipe
    from omni_train.recipe.validate import validate

    recipe = load_recipe(words)
    validate(recipe, ranks)
    return Path(recipe.runs_dir, recipe.run)


def of_task(command: Sequence[str], task: str) -> list[str]:
    """The command of one task of a job array.

    Raises:
        UserError: all tasks would train in one directory.
    """
    if not any(word.startswith(("run=", "runs_dir=")) and TASK in word for word in command):
        raise UserError(f"an array needs a run for each job: give run=NAME-{TASK}, where {TASK} is the task's number")
    return [word.replace(TASK, task) for word in command]
