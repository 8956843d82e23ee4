"""Checks of the audio and the vision encoder, for every network that has them."""

from __future__ import annotations

from math import isqrt

from omni_train.errors import UserError
from omni_train.recipe.refusals import divides, refuse
from omni_train.recipe.schema import Positions, Recipe, required


def check_parts(recipe: Recipe) -> None:
    """Refuse patterns over the parameters of an encoder that the model does not have.

    Raises:
        UserError: it names the first of them.
    """
    for encoder in ("audio", "vision"):
        if getattr(recipe.model, encoder) is not None:
            continue
        for key in ("trainable", "init_parts"):
            if pattern := next((name for name in getattr(recipe, key) if name.startswith(f"{encoder}_")), None):
                raise UserError(
                    f"{key}: '{pattern}' is of model.{encoder}, which model={recipe.model.name} does not have; "
                    "choose a model with it"
                )


def check_audio(recipe: Recipe) -> None:
    """Refuse an audio encoder that cannot be built or split.

    Raises:
        UserError: the first thing found, in one line.
    """
    audio, tensor = required(recipe.model.audio), recipe.parallel.tensor
    divides(recipe, audio.num_attention_heads, "model.audio.num_attention_heads", "model.audio.hidden_size")
    # Sines for one half of the width, cosines for the other.
    divides(recipe, 2, "the two halves of its positions", "model.audio.hidden_size")
    split = ("model.audio.num_attention_heads", "model.audio.intermediate_size")
    divides(recipe, tensor, "parallel.tensor", *split)
    frames_per_token = 2**audio.num_convolutions
    if recipe.data.media.positions is Positions.absolute and audio.chunk_frames % frames_per_token:
        refuse(
            recipe,
            "model.audio.chunk_frames",
            f"not a multiple of the {frames_per_token} frames of a token, so that tokens are not equally long; change "
            "it or choose data.media.positions=contiguous or qwen3_omni",
        )


def check_vision(recipe: Recipe) -> None:
    """Refuse a vision encoder that cannot be built or split.

    Raises:
        UserError: the first thing found, in one line.
    """
    vision, tensor = required(recipe.model.vision), recipe.parallel.tensor
    # Half of a head's dimensions turn with the row of a patch, half with its column, in pairs.
    divides(recipe, 4 * vision.num_heads, "4·model.vision.num_heads", "model.vision.hidden_size")
    divides(recipe, tensor, "parallel.tensor", "model.vision.num_heads", "model.vision.intermediate_size")
    if isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        refuse(recipe, "model.vision.num_position_embeddings", "not the number of places of a square table")
    levels = vision.deepstack_visual_indexes
    if levels != sorted(set(levels)) or not all(0 <= level < vision.depth for level in levels):
        refuse(
            recipe,
            "model.vision.deepstack_visual_indexes",
            f"must be rising layers from 0 to below model.vision.depth={vision.depth}",
        )


def check_deepstack(recipe: Recipe) -> None:
    """Refuse a Thinker whose layers that take features of vision are not all on the first pipeline stage.

    Raises:
        UserError: in one line.
    """
    thinker, levels = required(recipe.model.thinker), required(recipe.model.vision).deepstack_visual_indexes
    stages = recipe.parallel.pipeline * recipe.parallel.virtual_pipeline
    whole = thinker.pattern * thinker.repeats
    first = whole.partition("|")[0] if "|" in whole else whole[: len(whole) // stages]
    if (layers := first.count("E") + first.count("-")) < len(levels):
        refuse(
            recipe,
            "model.vision.deepstack_visual_indexes",
            f"{len(levels)} layers of the language model take them, but {layers} are on the first pipeline stage; "
            "lower parallel.pipeline or virtual_pipeline",
        )
