"""Command that a job runs on every rank: validation, and the directory of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_train.errors import UserError

TASK = "%a"
"""Placeholder of the task's number in a job array, as in sbatch's file names."""


def run_directory(command: Sequence[str], ranks: int | None) -> Path:
    """Directory of a command's run, after its recipe has been composed and validated.

    Args:
        command: ``train`` or ``pipeline`` and its arguments.
        ranks: number of ranks that will run it; None where it is not known yet.

    Raises:
        UserError: it is another command, has other flags than --config-dir, or its recipe cannot be composed or
            cannot work.
    """
    name, words = command[0] if command else "", list(command[1:])
    if name not in ("train", "pipeline"):
        raise UserError(f"{name or 'no command'}: must be train or pipeline under launchers/slurm.sh")
    from omni_train.recipe.hydra_app import parse

    options = vars(parse(words))
    words, config_dir = options.pop("overrides"), options.pop("config_dir")
    if flag := next(filter(options.get, options), None):
        raise UserError(
            f"--{flag.replace('_', '-')}: must be left out under SLURM, where --config-dir is the only flag; to sweep, "
            f"submit an array with run=NAME-{TASK}"
        )
    if name == "pipeline":
        from omni_train.commands import DATA
        from omni_train.recipe.pipeline import load_pipeline

        return load_pipeline(words, ranks, config_dir, DATA).directory
    from omni_train.recipe.compose import load_recipe
    from omni_train.recipe.validate import validate

    recipe = load_recipe(words, config_dir)
    validate(recipe, ranks)
    return Path(recipe.runs_dir, recipe.run)


def of_task(command: Sequence[str], task: str) -> list[str]:
    """Command of one task of a job array.

    Args:
        command: with TASK where the task's number belongs.
        task: the task's number.

    Raises:
        UserError: all tasks would train in one directory.
    """
    if not any(word.startswith(("run=", "runs_dir=")) and TASK in word for word in command):
        raise UserError(
            f"run= must differ between an array's jobs: give run=NAME-{TASK}, {TASK} being the task's number"
        )
    return [word.replace(TASK, task) for word in command]
