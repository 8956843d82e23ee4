"""Validation of the settings of media; a part of the one validation pass."""

from __future__ import annotations

from omni_train.recipe.refusals import refuse
from omni_train.recipe.schema import Positions, Recipe

_PAIRS = (
    ("image_min_pixels", "image_max_pixels"),
    ("video_min_pixels", "video_max_pixels"),
    ("video_min_frames", "video_max_frames"),
)


def check_media(recipe: Recipe) -> None:
    """Refuse media settings without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    media, vision = recipe.data.media, recipe.model.vision
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
