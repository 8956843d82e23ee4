"""TM-RoPE: the rotary ids (T, H, W) of every token of a sequence.

A sequence is a list of runs, in the order in which its tokens stand. ``docs/time.md`` tells the three styles apart, and
what of them is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_train.recipe.schema import Positions

QWEN3_OMNI_IDS_PER_SECOND = 13  # `position_id_per_seconds` of the released Qwen3-Omni


@dataclass(frozen=True)
class Pad:
    """Control token in the place of an encoder's outputs; ``encoder`` is ``audio`` or ``vision``."""

    token: str
    encoder: str


AUDIO_PAD = Pad("<|audio_pad|>", "audio")
IMAGE_PAD = Pad("<|image_pad|>", "vision")
VIDEO_PAD = Pad("<|video_pad|>", "vision")


@dataclass(frozen=True)
class Text:
    """Run of text or control tokens. ``continues``: they stand inside a medium that has begun."""

    length: int
    continues: bool = False


@dataclass(frozen=True)
class Stretch:
    """Run of tokens of a medium that follow each other in time, as those of sound do.

    ``time`` is that of the first token, in ids since its medium began; it counts in ``absolute`` alone.
    """

    length: int
    time: int = 0
    continues: bool = False
    pad: Pad = AUDIO_PAD


@dataclass(frozen=True)
class Frame:
    """Image, or one temporal patch of a video, of ``height`` x ``width`` tokens; ``time`` is as in Stretch."""

    pad: Pad
    height: int
    width: int
    time: int = 0
    continues: bool = False

    @property
    def length(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Block:
    """Whole video as in the released Qwen3-Omni, its sound (``audio`` tokens, or 0) among the patches."""

    frames: int
    height: int
    width: int
    seconds_per_frame: float
    audio: int

    @property
    def length(self) -> int:
        return self.frames * self.height * self.width + self.audio


Run = Text | Stretch | Frame | Block


def rotary_ids(runs: Sequence[Run], style: Positions) -> tuple[np.ndarray, np.ndarray, list[Pad]]:
    """Rotary ids of a sequence.

    The arithmetic is that of ``get_rope_index`` of Qwen3.5 (``contiguous``) and Qwen3-Omni in transformers, to the last
    bit of the latter's float32. ``absolute`` keeps a video's patches from coming before their time.

    Returns:
        ids (3, n), int64 or for ``qwen3_omni`` float32; the kind of each of the n tokens, uint8, 0 for text and k for
        the k-th of the pads; and those pads.
    """
    dtype, number = (np.float32, np.float32) if style == Positions.qwen3_omni else (np.int64, int)
    length = sum(run.length for run in runs)
    ids, kinds = np.empty((3, length), dtype), np.zeros(length, np.uint8)
    pads: list[Pad] = []

    def kind(pad: Pad) -> int:
        if pad not in pads:
            pads.append(pad)
        return 1 + pads.index(pad)

    free = number(0)  # 1 + the largest id so far
    free_time = number(0)  # 1 + the T id of the last token
    zero_time = number(0)  # T id at which the medium began
    end = 0
    for run in runs:
        begin, end = end, end + run.length
        if isinstance(run, Block):
            ids[:, begin:end], kinds[begin:end], free = _block(run, free, kind(VIDEO_PAD), kind(AUDIO_PAD))
            continue
        start = free
        if style == Positions.absolute and run.continues:
            start = free_time
        if style == Positions.absolute and not isinstance(run, Text):
            if run.continues:
                start = max(start, zero_time + run.time)
            else:
                zero_time = start - run.time
        if isinstance(run, Frame):
            grid = ids[:, begin:end].reshape(3, run.height, run.width)  # a view
            grid[0] = start
            grid[1] = start + np.arange(run.height, dtype=dtype)[:, None]
            grid[2] = start + np.arange(run.width, dtype=dtype)
            times, longest = 1, max(run.height, run.width)
        else:
            ids[:, begin:end] = start + np.arange(run.length, dtype=dtype)
            times = longest = run.length
        if not isinstance(run, Text):
            kinds[begin:end] = kind(run.pad)
        # Adding in another order would round other ids where floats are not whole.
        free = max(free, start + longest if isinstance(run, Text) else start + number(longest - 1) + 1)
        free_time = start + number(times - 1) + 1
    return ids, kinds, pads


def _block(
    run: Block, start: np.float32, vision_kind: int, audio_kind: int
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Ids and kinds of a video, its patches and sound merged by T, patches first on ties; and the id after it."""
    video = np.indices((run.frames, run.height, run.width), dtype=np.float32).reshape(3, -1)
    video[0] = video[0] * np.float32(run.seconds_per_frame) * np.float32(QWEN3_OMNI_IDS_PER_SECOND)
    audio = np.broadcast_to(np.arange(run.audio, dtype=np.float32), (3, run.audio))
    ids = np.concatenate([video, audio], axis=1) + start
    kinds = np.repeat(np.array([vision_kind, audio_kind], np.uint8), [video.shape[1], run.audio])
    order = np.argsort(ids[0], kind="stable")
    ids, kinds = ids[:, order], kinds[order]
    # The released rule goes on from the last stretch of one kind, even where an earlier patch had larger H or W ids.
    others = np.flatnonzero(kinds != kinds[-1])
    tail = others[-1] + 1 if len(others) else 0
    return ids, kinds, ids[:, tail:].max() + 1
