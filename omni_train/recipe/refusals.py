"""Refusals of recipes: errors of one line, by key and value."""

from __future__ import annotations

from typing import Any, NoReturn

from omni_train.errors import UserError
from omni_train.recipe.schema import Recipe, Recompute


def refuse(recipe: Recipe, key: str, why: str) -> NoReturn:
    """Raise a UserError of one line: the key with its value, what is wrong, what to do."""
    raise UserError(f"{key}={value(recipe, key)}: {why}")


def value(recipe: Recipe, key: str) -> Any:
    """Value of a dotted key in a recipe."""
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


def answers_no_questions(recipe: Recipe) -> None:
    """Refuse settings of answers for a network that does not generate any."""
    if recipe.evaluation.swap_media:
        refuse(recipe, "evaluation.swap_media", f"network={recipe.network} answers no questions; set it to false")


def keeps_activations(recipe: Recipe) -> None:
    """Refuse activation recomputation for a network that has none."""
    if recipe.recompute is not Recompute.none:
        refuse(recipe, "recompute", f"network={recipe.network} keeps its activations; set recompute=none")


def divides(recipe: Recipe, divisor: int, name: str, *keys: str) -> None:
    """Refuse the first of ``keys`` that is not a multiple of ``divisor``, which is called ``name``."""
    for key in keys:
        if value(recipe, key) % divisor:
            refuse(recipe, key, f"not a multiple of {name}={divisor}; change one of the two")
