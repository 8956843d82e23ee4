"""Specification of the Talker: codes of speech from the frozen Thinker's states, on the Megatron engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from omni_train.networks.base import Frozen, Networks, NetworkSpec
from omni_train.networks.stack import check_stack
from omni_train.networks.talker.checks import check_talker
from omni_train.recipe.schema import EngineName, Recipe, States, TextEmbedding, required

if TYPE_CHECKING:
    from omni_train.evaluation.speech import SpokenTexts
    from omni_train.objectives.talker import TalkerObjective


def _thinker(recipe: Recipe) -> Frozen:
    """The Thinker below, where it runs."""
    if recipe.data.speech.states is not States.live:
        return {}
    from omni_train.frozen.thinker import open_thinker

    path = recipe.talker_training.thinker
    assert path is not None, "validation refuses live states without a Thinker"
    return {"thinker": open_thinker(path, recipe, lambda below: check_stack(below, "model.thinker"))}


def _starting(recipe: Recipe) -> Recipe:
    """The recipe with the table of text taken from the Thinker, whatever the rest starts from."""
    thinker, table = recipe.talker_training.thinker, "embedding.word_embeddings.weight"
    own = required(recipe.model.talker).text_embedding is TextEmbedding.own
    if thinker is None or own or any(fnmatchcase(table, pattern) for pattern in recipe.init_parts):
        return recipe
    return replace(recipe, init_parts={**recipe.init_parts, table: thinker})


def _build(recipe: Recipe, frozen: Frozen) -> Networks:
    from omni_train.models.talker import build_chunks

    return {"model": build_chunks(recipe)}


def _objective(recipe: Recipe, networks: Networks, frozen: Frozen) -> TalkerObjective:
    from omni_train.objectives.talker import TalkerObjective

    return TalkerObjective(recipe, frozen.get("thinker"))


def _evaluation(recipe: Recipe, held_out: list, refused: Counter[str], frozen: Frozen) -> SpokenTexts:
    from omni_train import platform
    from omni_train.evaluation.speech import SpokenTexts
    from omni_train.frozen.recognizer import open_recognizer
    from omni_train.frozen.vocoder import open_vocoder

    evaluation, transcribe = recipe.evaluation, None
    assert evaluation.codec is not None, "validation refuses evaluation.every without a codec"
    decode = open_vocoder(evaluation.codec, recipe)
    if evaluation.recognizer is not None:
        # Half as much again as was to be said: what a Talker says that does not end is not written down in full.
        longest = max((len(prompt.tokens) for prompt in held_out), default=0)
        longest = max(platform.parallel.gather_over_data_ranks(longest))
        tokens = max(evaluation.max_new_tokens, longest * 3 // 2)
        listening = replace(recipe, evaluation=replace(evaluation, max_new_tokens=tokens))
        transcribe = open_recognizer(evaluation.recognizer, listening).transcribe
    return SpokenTexts(recipe, held_out, refused, decode, transcribe, frozen.get("thinker"))


def _flops(recipe: Recipe, rows: Sequence[Any], tokens: float, parameters: int) -> float:
    from omni_train.models.talker.flops import step_flops

    return step_flops(recipe, rows)


TALKER = NetworkSpec(
    name="talker",
    engines=(EngineName.megatron,),
    rows="speech",
    parts=("talker", "code2wav"),
    optional_parts=("thinker", "audio", "vision", "codec"),
    holds=("talker",),
    settings=("talker_training", "data.speech"),
    check=check_talker,
    frozen=_thinker,
    build=_build,
    starting=_starting,
    objective=_objective,
    evaluation=_evaluation,
    flops=_flops,
)
