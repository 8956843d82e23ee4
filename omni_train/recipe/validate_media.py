"""What of the encoders and of media cannot work; a part of the one validation pass."""

from __future__ import annotations

from math import isqrt

from omni_train.errors import UserError
from omni_train.recipe.refusals import bounds, divides, refuse
from omni_train.recipe.schema import Positions, Recipe

_AUDIO_AT_LEAST = {
    "model.audio.hidden_size": 1,
    "model.audio.num_hidden_layers": 1,
    "model.audio.num_attention_heads": 1,
    "model.audio.intermediate_size": 1,
    "model.audio.num_mel_bins": 1,
    "model.audio.conv_channels": 1,
    "model.audio.num_convolutions": 1,
    "model.audio.chunk_frames": 1,
    "model.audio.eval_window_frames": 0,
}
_VISION_AT_LEAST = {
    "model.vision.hidden_size": 1,
    "model.vision.depth": 1,
    "model.vision.num_heads": 1,
    "model.vision.intermediate_size": 1,
    "model.vision.patch_size": 1,
    "model.vision.temporal_patch_size": 1,
    "model.vision.spatial_merge_size": 1,
    "model.vision.num_position_embeddings": 1,
}
_MEDIA_AT_LEAST = {
    "data.media.image_min_pixels": 1,
    "data.media.video_min_frames": 1,
    "data.media.video_min_pixels": 1,
    "data.media.max_source_pixels": 1,
    "data.media.max_source_frames": 1,
    "data.media.max_media": 1,
    "data.max_sample_bytes": 1,
    "data.max_text_bytes": 1,
}
_PAIRS = (
    ("image_min_pixels", "image_max_pixels"),
    ("video_min_pixels", "video_max_pixels"),
    ("video_min_frames", "video_max_frames"),
)


def check_media(recipe: Recipe) -> None:
    """Refuse encoders that cannot be built or split, and media settings without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    _parts(recipe)
    if recipe.model.audio is not None:
        _audio(recipe)
    if recipe.model.vision is not None:
        _vision(recipe)
    _media(recipe)


def _parts(recipe: Recipe) -> None:
    """Patterns over the parameters of an encoder that the model does not have."""
    for encoder, sense in (("audio", "hear"), ("vision", "see")):
        if getattr(recipe.model, encoder) is not None:
            continue
        for key in ("trainable", "init_parts"):
            if pattern := next((name for name in getattr(recipe, key) if name.startswith(f"{encoder}_")), None):
                raise UserError(
                    f"{key}: '{pattern}' names a part of what model={recipe.model.name} does not have, it does not "
                    f"{sense}; choose a model with model.{encoder}"
                )


def _audio(recipe: Recipe) -> None:
    audio, tensor = recipe.model.audio, recipe.parallel.tensor
    bounds(recipe, at_least=_AUDIO_AT_LEAST)
    divides(recipe, audio.num_attention_heads, "model.audio.num_attention_heads", "model.audio.hidden_size")
    # Sines for one half of the width, cosines for the other.
    divides(recipe, 2, "the two halves of its positions", "model.audio.hidden_size")
    split = ("model.audio.num_attention_heads", "model.audio.intermediate_size")
    divides(recipe, tensor, "parallel.tensor", *split)
    if not audio.train_window_frames or min(audio.train_window_frames) < 0:
        refuse(recipe, "model.audio.train_window_frames", "must be frames, or 0 for a whole clip, one at least")
    frames_per_token = 2**audio.num_convolutions
    if recipe.data.media.positions is Positions.absolute and audio.chunk_frames % frames_per_token:
        refuse(
            recipe,
            "model.audio.chunk_frames",
            f"not a multiple of the {frames_per_token} frames of a token, so that tokens are not equally long; change "
            "it or choose data.media.positions=contiguous or qwen3_omni",
        )


def _vision(recipe: Recipe) -> None:
    model, vision, tensor = recipe.model, recipe.model.vision, recipe.parallel.tensor
    bounds(recipe, at_least=_VISION_AT_LEAST)
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
    stages = recipe.parallel.pipeline * recipe.parallel.virtual_pipeline
    whole = model.pattern * model.repeats
    first = whole.partition("|")[0] if "|" in whole else whole[: len(whole) // stages]
    if (layers := first.count("E") + first.count("-")) < len(levels):
        refuse(
            recipe,
            "model.vision.deepstack_visual_indexes",
            f"{len(levels)} layers of the language model take them, but {layers} are on the first pipeline stage; "
            "lower parallel.pipeline or virtual_pipeline",
        )


def _media(recipe: Recipe) -> None:
    media, vision = recipe.data.media, recipe.model.vision
    bounds(recipe, at_least=_MEDIA_AT_LEAST, above_zero=("data.media.video_fps", "data.media.max_audio_seconds"))
    for least, most in _PAIRS:
        if getattr(media, least) > getattr(media, most):
            refuse(recipe, f"data.media.{least}", f"above data.media.{most}={getattr(media, most)}; lower it")
    if vision is not None:
        token = (vision.patch_size * vision.spatial_merge_size) ** 2
        for key in ("image_max_pixels", "video_max_pixels"):
            if getattr(media, key) < token:
                refuse(recipe, f"data.media.{key}", f"less than the {token} pixels of one token; raise it")
    interval = media.audio_timestamp_seconds
    if interval and not (len(interval) == 2 and 0 < interval[0] <= interval[1]):
        refuse(recipe, "data.media.audio_timestamp_seconds", "must be two rising numbers above 0, or empty for none")
    if media.positions is Positions.qwen3_omni:
        if media.video_timestamps:
            refuse(recipe, "data.media.video_timestamps", "data.media.positions=qwen3_omni has none; set false")
        if interval:
            refuse(recipe, "data.media.audio_timestamp_seconds", "data.media.positions=qwen3_omni has none; set []")
        audio = recipe.model.audio
        if audio is not None and (audio.num_convolutions, audio.chunk_frames) != (3, 100):
            refuse(
                recipe,
                "data.media.positions",
                "has 13 ids a second, the audio tokens of 3 convolutions over chunks of 100 frames, and model.audio "
                "makes others; choose absolute or contiguous",
            )
