"""What of the recognizer cannot work."""

from __future__ import annotations

from omni_train.networks.encoders import check_audio, check_parts
from omni_train.recipe.refusals import answers_no_questions, bounds, divides, refuse
from omni_train.recipe.schema import Recipe

_RECOGNIZER_AT_LEAST = {
    "model.recognizer.hidden_size": 1,
    "model.recognizer.num_hidden_layers": 1,
    "model.recognizer.num_attention_heads": 1,
    "model.recognizer.intermediate_size": 1,
}
_RECOGNITION_AT_LEAST = {"recognition.ctc_weight": 0, "recognition.beam": 1}
_AUGMENTATION_AT_LEAST = {
    "data.augmentation.noise_probability": 0,
    "data.augmentation.frequency_masks": 0,
    "data.augmentation.frequency_mask_bins": 0,
    "data.augmentation.time_masks": 0,
    "data.augmentation.time_mask_frames": 0,
    "data.augmentation.time_mask_fraction": 0,
}
_AUGMENTATION_AT_MOST = {"data.augmentation.noise_probability": 1, "data.augmentation.time_mask_fraction": 1}
_SPEEDS = (0.5, 2.0)


def check_recognizer(recipe: Recipe) -> None:
    """Refuse a recognizer that cannot be built, and settings without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    check_parts(recipe)
    check_audio(recipe)
    bounds(recipe, at_least=_RECOGNIZER_AT_LEAST | _RECOGNITION_AT_LEAST)
    divides(recipe, recipe.model.recognizer.num_attention_heads, "its heads", "model.recognizer.hidden_size")
    # Sines for one half of the width, cosines for the other.
    divides(recipe, 2, "the two halves of its positions", "model.recognizer.hidden_size")
    if recipe.recognition.ctc_weight > 0 and not recipe.model.recognizer.ctc:
        refuse(recipe, "recognition.ctc_weight", "there is no CTC head; set model.recognizer.ctc=true, or 0")
    if min(recipe.recognition.eval_windows, default=1) < 1:
        refuse(recipe, "recognition.eval_windows", "must be frames above 0; whole clips are always evaluated")
    answers_no_questions(recipe)
    if recipe.data.augmentation is not None:
        _augmentation(recipe)


def _augmentation(recipe: Recipe) -> None:
    bounds(recipe, at_least=_AUGMENTATION_AT_LEAST, at_most=_AUGMENTATION_AT_MOST)
    speeds, snr = recipe.data.augmentation.speeds, recipe.data.augmentation.noise_snr_db
    if speeds and not (_SPEEDS[0] <= min(speeds) and max(speeds) <= _SPEEDS[1]):
        refuse(recipe, "data.augmentation.speeds", f"must lie from {_SPEEDS[0]} to {_SPEEDS[1]}; empty changes none")
    if len(snr) != 2 or snr[0] > snr[1]:
        refuse(recipe, "data.augmentation.noise_snr_db", "must be two rising numbers")
