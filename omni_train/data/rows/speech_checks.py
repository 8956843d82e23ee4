"""Checks of rows of speech: settings that do not fit them, or have no meaning with others."""

from __future__ import annotations

from omni_train.data.rows.speech_plans import TTS_BOS, TTS_END, TTS_PAD
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.refusals import divides, refuse, value
from omni_train.recipe.schema import DataConfig, LossOn, Recipe, SpeechConfig, States, TalkerStyle

INTERLEAVED = (
    "context",
    "max_media_positions",
    "schedules",
    "switch_label",
    "voice_reference",
    "voice_description",
    "voice_seconds",
)
"""Keys of ``data.speech`` that interleaved streams alone have."""


def check_speech(recipe: Recipe) -> None:
    """Refuse a recipe whose rows of speech cannot be made, or leave a setting without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    talker, data = recipe.model.talker, recipe.data
    if talker is None:
        refuse(recipe, "data.rows", "without model.talker there is nothing to learn from speech; give one")
    if data.codec is None:
        refuse(recipe, "data.codec", "the Talker learns codes; name the codec that `omni-train data codes` wrote with")
    _codec(recipe)
    parallel = recipe.parallel
    divides(recipe, data.alignment, "data.alignment", "data.speech.row_tokens")
    divides(recipe, parallel.tensor, "parallel.tensor", "data.speech.row_tokens")
    if parallel.context > 1:
        pieces = 2 * parallel.context * parallel.tensor
        divides(recipe, pieces, "2·parallel.context·parallel.tensor", "data.speech.row_tokens")
    if data.loss_on is not LossOn.assistant:
        refuse(recipe, "data.loss_on", "the Talker learns what is spoken alone; set assistant")
    if talker.style is TalkerStyle.dual_track:
        _unused(recipe, INTERLEAVED, "model.talker.style=dual_track")
        if not talker.speaker_ids:
            refuse(recipe, "model.talker.speaker_ids", "dual_track speaks in the voices that have names; give some")
    if data.speech.states is States.none:
        _unused(recipe, ("context", "max_media_positions"), "data.speech.states=none")


def check_speech_tokens(data: DataConfig) -> None:
    """Refuse a tokenizer without the control tokens of the Talker's text.

    Raises:
        UserError: it lacks one.
    """
    tokenizer = Tokenizer(data.tokenizer)
    for name in (TTS_PAD, TTS_BOS, TTS_END):
        tokenizer.token_id(name)


def _codec(recipe: Recipe) -> None:
    """Refuse a codec of other frames than the Talker's."""
    if recipe.model.code2wav is None:
        refuse(recipe, "model.code2wav", "tells how long a frame of codes is; compose a model with one")
    for key, theirs in (("num_code_groups", "num_quantizers"), ("codebook_size", "codebook_size")):
        codec = value(recipe, f"model.code2wav.{theirs}")
        if value(recipe, f"model.talker.{key}") != codec:
            refuse(recipe, f"model.talker.{key}", f"model.code2wav.{theirs} is {codec}; set both")


def _unused(recipe: Recipe, keys: tuple[str, ...], what: str) -> None:
    """Refuse another value than the default of keys that have no meaning."""
    defaults = SpeechConfig()
    for key in keys:
        if getattr(recipe.data.speech, key) != getattr(defaults, key):
            refuse(recipe, f"data.speech.{key}", f"has no meaning with {what}; leave {getattr(defaults, key)}")
