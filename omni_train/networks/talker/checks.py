"""Checks of the Talker: its layers, its codes, and what it reads of the Thinker."""

from __future__ import annotations

from omni_train.networks.encoders import check_audio, check_vision
from omni_train.networks.stack import check_stack
from omni_train.recipe.refusals import answers_no_questions, divides, refuse
from omni_train.recipe.schema import OptimizerName, Recipe, States, TalkerStyle, TextEmbedding, required

_CONTROLS = ("codec_pad_id", "codec_bos_id", "codec_eos_id", "codec_text_id")
_THINKING = ("codec_nothink_id", "codec_think_bos_id", "codec_think_eos_id")


def check_talker(recipe: Recipe) -> None:
    """Refuse a Talker that cannot be built or split, and settings without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    check_stack(recipe, "model.talker")
    _codes(recipe)
    _predictor(recipe)
    _rows(recipe)
    _thinker(recipe)
    answers_no_questions(recipe)
    _evaluation(recipe)
    if recipe.optimizer.name is OptimizerName.muon:
        refuse(recipe, "optimizer.name", "the Talker's stacked tables are no matrices of Muon; use optimizer=adamw")


def _codes(recipe: Recipe) -> None:
    talker, code2wav = required(recipe.model.talker), required(recipe.model.code2wav)
    for key, other in (("num_code_groups", "num_quantizers"), ("codebook_size", "codebook_size")):
        if getattr(talker, key) != getattr(code2wav, other):
            refuse(recipe, f"model.talker.{key}", f"model.code2wav.{other} is {getattr(code2wav, other)}; set both")
    used = [f"model.talker.{key}" for key in _CONTROLS]
    if talker.style is TalkerStyle.dual_track:
        used += [f"model.talker.{key}" for key in _THINKING]
    ids = {key: getattr(talker, key.rpartition(".")[2]) for key in used}
    ids |= {f"model.talker.speaker_ids.{name}": code for name, code in talker.speaker_ids.items()}
    for key, code in ids.items():
        if not talker.codebook_size <= code < talker.codec_vocab_size:
            why = f"model.talker.codebook_size={talker.codebook_size} to model.talker.codec_vocab_size"
            refuse_value(key, code, f"must be from {why}={talker.codec_vocab_size}, that excluded")
        if (same := [other for other in ids if ids[other] == code])[0] != key:
            refuse_value(key, code, f"is {same[0]} too; give each control code an id of its own")


def refuse_value(key: str, found: int | str, why: str) -> None:
    """Raise a UserError about an entry that no dotted key names."""
    from omni_train.errors import UserError

    raise UserError(f"{key}={found}: {why}")


def _predictor(recipe: Recipe) -> None:
    predictor = "model.talker.code_predictor"
    sizes = required(recipe.model.talker).code_predictor
    divides(recipe, 2, "a pair of dimensions", f"{predictor}.head_dim")
    divides(recipe, sizes.num_key_value_heads, f"{predictor}.num_key_value_heads", f"{predictor}.num_attention_heads")


def _rows(recipe: Recipe) -> None:
    data, parallel, speech = recipe.data, recipe.parallel, "data.speech.row_tokens"
    pieces = 2 * parallel.context * parallel.tensor if parallel.context > 1 else parallel.tensor
    divides(recipe, pieces, "2·parallel.context·parallel.tensor" if parallel.context > 1 else "parallel.tensor", speech)
    divides(recipe, data.alignment, "data.alignment", speech)
    most = required(recipe.model.talker).max_position_embeddings
    if data.speech.row_tokens > most:
        refuse(recipe, speech, f"longer than model.talker.max_position_embeddings={most}; shorten the rows")


def _thinker(recipe: Recipe) -> None:
    talker, training, states = required(recipe.model.talker), recipe.talker_training, recipe.data.speech.states
    if training.thinker is None:
        if states is not States.none:
            refuse(
                recipe,
                "talker_training.thinker",
                f"data.speech.states={states} reads a Thinker; name its checkpoint, or set data.speech.states=none",
            )
        if talker.text_embedding is TextEmbedding.thinker and not (recipe.init_from or recipe.init_parts):
            refuse(
                recipe,
                "talker_training.thinker",
                "model.talker.text_embedding=thinker is the Thinker's table; name its checkpoint, or choose own",
            )
    if states is States.live:
        if recipe.model.audio is not None:
            check_audio(recipe)
        if recipe.model.vision is not None:
            check_vision(recipe)


def _evaluation(recipe: Recipe) -> None:
    evaluation = recipe.evaluation
    schedules, several = evaluation.speech_schedules, "evaluation.speech_schedules"
    if schedules and required(recipe.model.talker).style is TalkerStyle.dual_track:
        refuse_value(several, len(schedules), "model.talker.style=dual_track has one order; leave them out")
    names = [schedule.name for schedule in schedules]
    if twice := [name for name in names if names.count(name) > 1]:
        refuse_value(several, twice[0], "is named twice; leave one out")
    if not evaluation.every:
        return
    if evaluation.codec is None:
        refuse(
            recipe,
            "evaluation.every",
            "speaks held-out texts; name the codec that makes them sound by evaluation.codec, or set 0",
        )
    if recipe.parallel.expert > 1:
        refuse(
            recipe,
            "parallel.expert",
            f"evaluation.every={evaluation.every} speaks, for which experts must not be divided; set one of the two",
        )
