"""Checks of the Thinker: its layers, how a layout splits them, and its encoders."""

from __future__ import annotations

from omni_train.networks.encoders import check_audio, check_deepstack, check_parts, check_vision
from omni_train.networks.stack import check_stack
from omni_train.recipe.refusals import refuse
from omni_train.recipe.schema import Recipe, required


def check_thinker(recipe: Recipe) -> None:
    """Refuse a Thinker that cannot be built or split.

    Raises:
        UserError: the first thing found, in one line.
    """
    check_stack(recipe, "model.thinker")
    check_parts(recipe)
    if recipe.model.audio is not None:
        check_audio(recipe)
    if recipe.model.vision is not None:
        check_vision(recipe)
        check_deepstack(recipe)
    if recipe.data.row_tokens > (most := required(recipe.model.thinker).max_position_embeddings):
        refuse(recipe, "data.row_tokens", f"longer than model.thinker.max_position_embeddings={most}; shorten the rows")
