"""A run of a recipe, from the command line to its end."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from omni_train import lines, platform, stopping
from omni_train.data.rows.kinds import check_rows
from omni_train.platform import failures
from omni_train.platform.logs import say, warn
from omni_train.platform.signals import Watchdog, alive
from omni_train.processes import Exit
from omni_train.recipe.compose import write_recipe
from omni_train.recipe.schema import Recipe
from omni_train.recipe.validate import validate
from omni_train.training.resume import check_resume
from omni_train.training.run_lock import RunLock, holding


def run(recipe: Recipe) -> int:
    """Run a recipe on this rank, with whatever ranks the launcher started.

    Returns:
        the process's exit status.

    Raises:
        UserError: the recipe, the data or a checkpoint cannot work.
        RankFailed: another rank could not go on.
    """
    lines.begin_log()
    return Exit.finished if train(recipe) else Exit.stopped


def train(recipe: Recipe, lock: RunLock | None = None) -> bool:
    """Train a recipe on this rank and say how it ended; raises as :func:`run` does.

    Args:
        recipe: a validated recipe.
        lock: the lock of the run's directory, where the caller holds it already.

    Returns:
        False where a signal asked to stop.
    """
    validate(recipe, platform.world_size())
    check_rows(recipe)
    directory = Path(recipe.runs_dir, recipe.run)
    watchdog = Watchdog(recipe.safety.hang_seconds)
    platform.init_distributed(timeout_seconds=recipe.safety.hang_seconds)
    failures.listen()
    trainer = None
    try:
        from omni_train.training.trainer import Trainer

        with (
            failures.told(),
            nullcontext(lock) if lock else holding(directory, remedy="give another run=") as held,
        ):
            check_resume(recipe, directory)
            platform.parallel.initialize(recipe.parallel, recipe.seed)
            alive()
            trainer = Trainer(recipe)
            trainer.store.guard = held.check
            written = _write_recipe(recipe, directory)
            finished = trainer.fit()
            if not written:
                _write_recipe(recipe, directory)
            ending = trainer.ending()
    except RuntimeError:
        if trainer is not None and not trainer.stepped:
            # After a signal: another rank was about to take its first step, and its connections ended with it.
            stopping.at_once(f"before step {trainer.step + 1}, nothing new to save")
        raise
    finally:
        del trainer  # so that its memory can be freed below
        platform.parallel.destroy()
        platform.leave_distributed()
        watchdog.stop()
    say(ending)
    return finished


def _write_recipe(recipe: Recipe, directory: Path) -> bool:
    """Write the run's ``recipe.yaml`` on the first rank; False where that fails, which does not stop a run."""
    path = directory / "recipe.yaml"
    try:
        if platform.rank() == 0:
            write_recipe(recipe, path)
    except OSError as error:
        warn(f"{path}: cannot be written: {error.strerror}; it is tried again when the run ends")
        return False
    return True
