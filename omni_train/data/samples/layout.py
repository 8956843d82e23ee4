"""Layout of media among the tokens: control tokens around them, timestamps, and their order in time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omni_train.data.samples.positions import IMAGE_PAD, VIDEO_PAD, Block, Frame, Stretch
from omni_train.data.samples.timestamps import timestamp

AUDIO_START, AUDIO_END = "<|audio_start|>", "<|audio_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class Marks:
    """Control tokens at the borders of a medium; ``continues``: the medium has begun before them."""

    names: tuple[str, ...]
    continues: bool = False


@dataclass(frozen=True)
class Stamp:
    """Timestamp, which is encoded with the text beside it."""

    text: str
    continues: bool = False


Item = Marks | Stamp | Stretch | Frame | Block


def lay_out_audio(tokens: int, stamps: list[tuple[int, str]]) -> list[Item]:
    """Items of a sound of ``tokens`` audio tokens, with timestamps before the tokens of the given indices."""
    items: list[Item] = [Marks((AUDIO_START,))]
    begin = 0
    for index, text in stamps:
        items += [Stretch(index - begin, begin, continues=begin > 0), Stamp(text, continues=True)]
        begin = index
    return [*items, Stretch(tokens - begin, begin, continues=begin > 0), Marks((AUDIO_END,), continues=True)]


def lay_out_image(height: int, width: int) -> list[Item]:
    """Items of an image of ``height`` x ``width`` tokens."""
    return [Marks((VISION_START,)), Frame(IMAGE_PAD, height, width), Marks((VISION_END,))]


def lay_out_video(
    height: int, width: int, seconds: np.ndarray, sound: int, *, tokens_per_second: float, timestamps: bool
) -> list[Item]:
    """Items of a video with temporal patches of ``height`` x ``width`` tokens at ``seconds`` (t,) and ``sound`` tokens.

    Everything stands in order of time on the grid of the audio tokens, a patch before the audio token of the same time,
    each patch and each stretch of sound between its own marks, and a timestamp before each patch.
    """
    items: list[Item] = []
    placed = 0

    def add_audio(until: int) -> None:
        nonlocal placed
        if until > placed:
            begun = bool(items)
            items.extend(
                [Marks((AUDIO_START,), begun), Stretch(until - placed, placed, begun), Marks((AUDIO_END,), True)]
            )
            placed = until

    for second in seconds:
        step = int(second * tokens_per_second + 0.5)
        add_audio(min(step, sound))
        begun = bool(items)
        if timestamps:
            items.append(Stamp(timestamp(second), begun))
        items += [
            Marks((VISION_START,), begun),
            Frame(VIDEO_PAD, height, width, step, begun),
            Marks((VISION_END,), True),
        ]
    add_audio(sound)
    return items


def lay_out_block(block: Block) -> list[Item]:
    """Items of a video as in the released Qwen3-Omni: one span with its sound within."""
    if block.audio == 0:
        return [Marks((VISION_START,)), block, Marks((VISION_END,))]
    return [Marks((VISION_START, AUDIO_START)), block, Marks((AUDIO_END,)), Marks((VISION_END,))]
