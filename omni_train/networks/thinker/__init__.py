"""Specification of the Thinker: a language model with audio and vision encoders, on the Megatron engine."""

from __future__ import annotations

from omni_train.networks.base import NetworkSpec
from omni_train.networks.thinker.checks import check_thinker
from omni_train.recipe.schema import EngineName


def _build(recipe, frozen):
    from omni_train.models.thinker import build_chunks

    return {"model": build_chunks(recipe)}


def _objective(recipe, networks, frozen):
    from omni_train.objectives.language_modelling import LanguageModelling

    model = recipe.model
    return LanguageModelling(
        recipe.loss_chunk_tokens, model.thinker.mtp_loss_weight, by_modality=bool(model.audio or model.vision)
    )


def _evaluation(recipe, held_out, refused, frozen):
    from omni_train.evaluation.answers import Answers

    return Answers(recipe, held_out, refused)


def _flops(recipe, rows, tokens, parameters):
    from omni_train.models.thinker.flops import step_flops

    return step_flops(recipe.model, rows)


THINKER = NetworkSpec(
    name="thinker",
    engines=(EngineName.megatron,),
    rows="chats",
    parts=("thinker",),
    optional_parts=("audio", "vision"),
    check=check_thinker,
    build=_build,
    objective=_objective,
    evaluation=_evaluation,
    flops=_flops,
)
