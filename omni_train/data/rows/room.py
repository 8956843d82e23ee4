"""Room of a row that a chat's media share: what cannot fit is refused early, videos are as large as there is room."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from omni_train.data.samples.clips import Clip
from omni_train.data.samples.kinds import medium_kinds
from omni_train.data.samples.rendering import rendered_length
from omni_train.data.samples.sample import Medium, SampleError, Turn
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import MediaConfig

VIDEO_READINGS = 4  # at most, until a video fits; the second nearly always does
TURN_TOKENS = 4  # at least: <|im_start|>, the role and its line end, <|im_end|>, a line end
MEDIUM_TOKENS = 3  # at least: one between two marks
COMPOSED = 4  # characters that become one in Unicode's NFC, which some tokenizers write: a letter and three marks


def refuse_many(turns: Sequence[Turn], row_tokens: int, media: MediaConfig) -> None:
    """Refuse a chat of more than a row could hold by the number of its turns and media, before any is read.

    Raises SampleError: ``too_long``, or ``too_many_media``.
    """
    number = sum(len(turn.media) for turn in turns)
    if number > media.max_media:
        raise SampleError("too_many_media")
    if TURN_TOKENS * len(turns) + MEDIUM_TOKENS * number > row_tokens:
        raise SampleError("too_long")


def refuse_long(turns: Sequence[Turn], tokenizer: Tokenizer, row_tokens: int) -> None:
    """Refuse a chat whose texts cannot fit in a row, before they are encoded. Raises SampleError ``too_long``."""
    characters = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
    if characters > COMPOSED * tokenizer.longest * row_tokens:
        raise SampleError("too_long")


def read_clips(
    turns: Sequence[Turn],
    length: int,
    tokenizer: Tokenizer,
    max_tokens: int,
    read: Callable[..., Clip],
) -> dict[Medium, Clip]:
    """Read all media of ``turns``, whose text is ``length`` long; videos last, in equal shares of the tokens left."""

    def shrinks(medium: Medium) -> bool:
        return medium_kinds()[medium.kind].shrinks

    clips: dict[Medium, Clip] = {}
    left = max_tokens - length
    waiting = sorted((medium for turn in turns for medium in turn.media), key=shrinks)
    for index, medium in enumerate(waiting):
        if left < 0:
            break
        if medium not in clips and shrinks(medium):
            share = left // (len(waiting) - index)
            clips[medium], length = _read_video(functools.partial(read, medium, sound_tokens=share), share, tokenizer)
        else:
            clips[medium] = clips.get(medium) or read(medium, sound_tokens=left)
            length = rendered_length(clips[medium], tokenizer)
        left -= length
    if left < 0:
        raise SampleError("too_long")
    return clips


def _read_video(read: Callable[..., Clip], share: int, tokenizer: Tokenizer) -> tuple[Clip, int]:
    """Largest reading of a video of at most ``share`` tokens, sound and timestamps included, and its tokens."""
    room = share
    for _ in range(VIDEO_READINGS):
        if room <= 0:
            break
        clip = read(max_tokens=room)
        length = rendered_length(clip, tokenizer)
        if length <= share:
            return clip, length
        # Nothing was known of its sound and timestamps. Timestamps become fewer with the patches, sound does not.
        room = clip.vision_tokens * (share - clip.audio_tokens) // (length - clip.audio_tokens)
    raise SampleError("too_long")
