"""Specification of the Thinker: a language model with audio and vision encoders, on the Megatron engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omni_train.networks.base import Frozen, Networks, NetworkSpec
from omni_train.networks.thinker.checks import check_thinker
from omni_train.recipe.schema import EngineName, Recipe, required

if TYPE_CHECKING:
    from omni_train.evaluation.answers import Answers
    from omni_train.objectives.language_modelling import LanguageModelling


def _build(recipe: Recipe, frozen: Frozen) -> Networks:
    from omni_train.models.thinker import build_chunks

    return {"model": build_chunks(recipe)}


def _objective(recipe: Recipe, networks: Networks, frozen: Frozen) -> LanguageModelling:
    from omni_train.objectives.language_modelling import LanguageModelling

    model = recipe.model
    by_modality = bool(model.audio or model.vision)
    return LanguageModelling(recipe.loss_chunk_tokens, required(model.thinker).mtp_loss_weight, by_modality)


def _evaluation(recipe: Recipe, held_out: list, refused: Counter[str], frozen: Frozen) -> Answers:
    from omni_train.evaluation.answers import Answers

    return Answers(recipe, held_out, refused)


def _flops(recipe: Recipe, rows: Sequence[Any], tokens: float, parameters: int) -> float:
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
