"""Checks of the recognizer."""

from __future__ import annotations

from omni_train.networks.encoders import check_audio, check_parts
from omni_train.recipe.refusals import answers_no_questions, divides, refuse
from omni_train.recipe.schema import Recipe, required


def check_recognizer(recipe: Recipe) -> None:
    """Refuse a recognizer that cannot be built, and settings without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    check_parts(recipe)
    check_audio(recipe)
    recognizer = required(recipe.model.recognizer)
    divides(recipe, recognizer.num_attention_heads, "its heads", "model.recognizer.hidden_size")
    # Sines for one half of the width, cosines for the other.
    divides(recipe, 2, "the two halves of its positions", "model.recognizer.hidden_size")
    if recipe.recognition.ctc_weight > 0 and not recognizer.ctc:
        refuse(recipe, "recognition.ctc_weight", "there is no CTC head; set model.recognizer.ctc=true, or 0")
    answers_no_questions(recipe)
    if recipe.data.augmentation is not None:
        snr = recipe.data.augmentation.noise_snr_db
        if len(snr) != 2 or snr[0] > snr[1]:
            refuse(recipe, "data.augmentation.noise_snr_db", "must be two rising numbers")
