"""Names that keys once had in recipes and checkpoints, read as those of today."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omni_train.recipe.schema import ThinkerConfig

_THINKER = {entry.name for entry in fields(ThinkerConfig)}


def model_of_today(model: Mapping[str, Any]) -> dict[str, Any]:
    """Model as it was written, with the Thinker's keys in ``thinker``: they once stood beside the other parts."""
    found = dict(model)
    once = {key: found.pop(key) for key in model if key in _THINKER}
    if once and "thinker" not in found:
        found["thinker"] = once
    return found


def recipe_of_today(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe of a run as it was written, with the keys of today."""
    found = dict(recipe)
    if isinstance(found.get("model"), Mapping):
        found["model"] = model_of_today(found["model"])
    return found


def key_of_today(key: str) -> str | None:
    """Today's key for one that was once written; None where the name is none of the past."""
    group, _, name = key.rpartition(".")
    return f"model.thinker.{name}" if group == "model" and name in _THINKER else None
