"""What the ZeRO engine trains of a recipe's network, and how that is evaluated."""

from __future__ import annotations

from collections.abc import Callable

from omni_train.objectives.task import Task
from omni_train.recipe.schema import NetworkName, Recipe
from omni_train.training.feed import Feed


def build_task(recipe: Recipe) -> Task:
    """The recipe's networks with what they minimise, on this rank's device."""
    if recipe.network is NetworkName.recognizer:
        from omni_train.objectives.recognition import Recognition

        return Recognition(recipe)
    raise NotImplementedError(recipe.network)


def build_evaluation(recipe: Recipe, feed: Feed) -> Callable:
    """What answers held-out questions with plain networks: returns figures, and predictions that are to be shown."""
    if recipe.network is NetworkName.recognizer:
        from omni_train.training.recognition_evaluation import RecognitionEvaluation

        run = RecognitionEvaluation(recipe, feed)
        return lambda networks: run(networks["model"])
    raise NotImplementedError(recipe.network)
