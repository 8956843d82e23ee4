"""Specification of the recognizer: audio encoder with a transcript decoder (AuT pre-training), on the ZeRO engine."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from omni_train.networks.base import Frozen, Networks, NetworkSpec
from omni_train.networks.recognizer.checks import check_recognizer
from omni_train.recipe.schema import EngineName, Recipe

if TYPE_CHECKING:
    from omni_train.evaluation.transcripts import Transcripts
    from omni_train.objectives.recognition import Recognition


def _build(recipe: Recipe, frozen: Frozen) -> Networks:
    from omni_train.models.recognizer import SpeechRecognizer

    return {"model": SpeechRecognizer(recipe)}


def _objective(recipe: Recipe, networks: Networks, frozen: Frozen) -> Recognition:
    from omni_train.objectives.recognition import Recognition

    return Recognition(recipe)


def _evaluation(recipe: Recipe, held_out: list, refused: Counter[str], frozen: Frozen) -> Transcripts:
    from omni_train.evaluation.transcripts import Transcripts

    return Transcripts(recipe, held_out, refused)


RECOGNIZER = NetworkSpec(
    name="recognizer",
    engines=(EngineName.deepspeed,),
    rows="transcripts",
    parts=("audio", "recognizer"),
    settings=("recognition",),
    check=check_recognizer,
    build=_build,
    objective=_objective,
    evaluation=_evaluation,
)
