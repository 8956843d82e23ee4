"""Specification of the recognizer: audio encoder with a transcript decoder (AuT pre-training), on the ZeRO engine."""

from __future__ import annotations

from omni_train.networks.base import NetworkSpec
from omni_train.networks.recognizer.checks import check_recognizer
from omni_train.recipe.schema import EngineName


def _build(recipe, frozen):
    from omni_train.models.recognizer import SpeechRecognizer

    return {"model": SpeechRecognizer(recipe)}


def _objective(recipe, networks, frozen):
    from omni_train.objectives.recognition import Recognition

    return Recognition(recipe)


def _evaluation(recipe, held_out, refused, frozen):
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
