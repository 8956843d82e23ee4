"""Resuming with a changed recipe: a run goes on with the recipe that it was made with, but for what may change."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from omni_train.checkpoint.store import newest
from omni_train.errors import UserError
from omni_train.platform.agreement import on_first_rank
from omni_train.platform.logs import say, warn
from omni_train.recipe.changes import Difference, differences
from omni_train.recipe.compose import read_recipe
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.keys import Change, described
from omni_train.recipe.schema import Recipe


def check_resume(recipe: Recipe, directory: Path) -> None:
    """Log what a recipe changes of the run in a directory, where there is one to go on with. Collective.

    Raises:
        UserError: on all ranks: the recipe changes a key that may not change.
    """

    def check() -> None:
        if newest(directory / "checkpoints") is None:
            return
        changed = changes(recipe, directory)
        if kept := next((one for one in changed if one.kind is Change.kept), None):
            refuse_change(directory, kept)
        if changed:
            words = ", ".join(f"{one.key}={one.now} instead of {one.before}" for one in changed)
            say(f"{directory}: goes on with {words}")

    on_first_rank(check)


def changes(recipe: Recipe, directory: Path) -> list[Difference]:
    """Differences of a recipe from the one that the run in a directory was last started with; none where that is lost.

    Raises:
        UserError: the run's recipe.yaml cannot be read.
    """
    path = directory / "recipe.yaml"
    if not path.exists():
        warn(f"{path}: not there, so nothing shows whether this run was made with the same recipe")
        return []
    try:
        before = read_recipe(path)
    except UserError as error:
        raise UserError(f"{error}; mend it, or remove it to go on without comparing") from error
    return list(differences(recipe, before))


def refuse_change(directory: Path, change: Difference) -> NoReturn:
    """Refuse to go on with the run in a directory, because of a change of its recipe.

    Raises:
        UserError: always.
    """
    moved = described(recipe_type())[change.key].key.linkable
    links = "; where data were moved, leave links" if moved else ""
    raise UserError(
        f"{directory}: was made with {change.key}={change.before}, now it is {change.now}; give another run=, or "
        f"remove this directory and what was trained from it{links}"
    )
