"""How a recipe is refused: by key and value, in one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NoReturn

from omni_train.errors import UserError
from omni_train.recipe.schema import Recipe, Recompute


def refuse(recipe: Recipe, key: str, why: str) -> NoReturn:
    """Raise a UserError of one line: the key with its value, what is wrong, what to do."""
    raise UserError(f"{key}={value(recipe, key)}: {why}")


def value(recipe: Recipe, key: str):
    """The value of a dotted key."""
    found = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


def answers_no_questions(recipe: Recipe) -> None:
    """Refuse settings of answers for a network that gives none."""
    if recipe.evaluation.swap_media:
        refuse(recipe, "evaluation.swap_media", f"network={recipe.network} answers no questions; set it to false")


def keeps_activations(recipe: Recipe) -> None:
    """Refuse recomputation of a network that has none."""
    if recipe.recompute is not Recompute.none:
        refuse(recipe, "recompute", f"network={recipe.network} keeps its activations; set recompute=none")


def finite(found: object, key: str = "") -> None:
    """Refuse the first number of a recipe, as dictionaries, that is none: NaN passes every comparison with a bound."""
    if isinstance(found, dict | list | tuple):
        for name, inner in found.items() if isinstance(found, dict) else enumerate(found):
            finite(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(found, float) and not math.isfinite(found):
        raise UserError(f"{key}={found}: must be a finite number")


def divides(recipe: Recipe, divisor: int, name: str, *keys: str) -> None:
    """Refuse the first of ``keys`` that is not a multiple of ``divisor``, which is called ``name``."""
    for key in keys:
        if value(recipe, key) % divisor:
            refuse(recipe, key, f"not a multiple of {name}={divisor}; change one of the two")


def bounds(
    recipe: Recipe,
    *,
    at_least: Mapping[str, float],
    above_zero: Iterable[str] = (),
    at_most: Mapping[str, float] | None = None,
) -> None:
    """Refuse the first number out of its bounds, `None` values passing."""
    for key, least in at_least.items():
        found = value(recipe, key)
        if found is not None and found < least:
            refuse(recipe, key, f"must be at least {least}")
    for key in above_zero:
        if value(recipe, key) <= 0:
            refuse(recipe, key, "must be above 0")
    for key, most in (at_most or {}).items():
        if value(recipe, key) > most:
            refuse(recipe, key, f"must be at most {most}")
