"""The task of a recipe that the ZeRO engine trains."""

from __future__ import annotations

from omni_train.objectives.task import Task
from omni_train.recipe.schema import NetworkName, Recipe


def build_task(recipe: Recipe) -> Task:
    """The recipe's networks with what they minimise, on this rank's device."""
    if recipe.network is NetworkName.recognizer:
        from omni_train.objectives.recognition import Recognition

        return Recognition(recipe)
    raise NotImplementedError(recipe.network)
