"""What a sample is: a document, or a chat with media; and what refuses one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_train.errors import UserError

OTHERS = {
    "conversations": ("sharegpt_conversations", "ShareGPT: write messages of role and content instead"),
    "image_url": ("openai_image_url", "an OpenAI part: write type image and the name of a file instead"),
    "input_image": ("openai_input_image", "an OpenAI part: write type image and the name of a file instead"),
    "input_audio": ("openai_input_audio", "an OpenAI part: write type audio and the name of a file instead"),
    "audio_url": ("openai_audio_url", "a part of vLLM: write type audio and the name of a file instead"),
    "video_url": ("openai_video_url", "a part of vLLM: write type video and the name of a file instead"),
}
"""Formats of others, by their keys and types of parts: reasons of refusal, and what is to be done."""
_ADVICE = dict(OTHERS.values()) | {
    "media_outside": "media that lie outside the manifest's folder: name theirs with roots=FOLDER,FOLDER",
    "unwritten_reasoning": "ChatML has no place for reasoning_content: set chat_template=qwen3_5",
}

_log = logging.getLogger(__name__)
_logged: set[str] = set()  # kinds of unexpected errors, in this process


class SampleError(Exception):
    """A sample that training goes on without. ``reason`` is a short stable name, counted in ``PackedBatch.skipped``."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def one_sample() -> Iterator[None]:
    """Within, whatever one sample makes fail refuses that sample.

    Raises SampleError: with its own reason, or as ``unexpected_...`` with the kind of error, which is then logged once,
    for it may be a mistake of ours. A failed assertion surely is, and goes through, and so does what is no sample's.
    """
    try:
        yield
    except (SampleError, UserError, AssertionError):
        raise
    except Exception as error:
        reason = f"unexpected_{type(error).__name__}"
        if reason not in _logged:
            _logged.add(reason)
            _log.warning("a sample was refused as %s; the first of them:", reason, exc_info=error)
        raise SampleError(reason) from error


def describe(refused: Mapping[str, int]) -> str:
    """Reasons and counts in words, the commonest first, with what is to be done about samples of a known format."""
    told = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        f"{reason} {count:,}{f' ({_ADVICE[reason]})' if reason in _ADVICE else ''}" for reason, count in told
    )


@dataclass(frozen=True)
class Medium:
    """A file of the sample that stands in a turn; ``kind`` is one of ``medium_kinds``."""

    kind: str
    file: str
    sound: bool = False  # of a video: is its sound track heard?
    start: float | None = None  # seconds
    end: float | None = None  # seconds


@dataclass(frozen=True)
class Turn:
    """One message of a chat: texts and media in order; ``role`` is system, user or assistant."""

    role: str
    parts: tuple[str | Medium, ...]
    reasoning: str | None = None  # of an answer: what is thought before it

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> tuple[Medium, ...]:
        return tuple(part for part in self.parts if isinstance(part, Medium))


@dataclass(frozen=True)
class Document:
    """A text that is learned whole."""

    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    speech: str | None = None  # the file in which it is spoken


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the recipe says what is learned."""

    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    speech: str | None = None  # the file in which the last answer is spoken

    @property
    def media(self) -> tuple[Medium, ...]:
        return tuple(medium for turn in self.turns for medium in turn.media)


Sample = Document | Chat


def speech_of(sample: Sample) -> Medium | None:
    """The sound that a sample teaches to speak: its speech target, else the first sound of a chat."""
    if sample.speech is not None:
        return Medium("audio", sample.speech)
    return next((medium for medium in getattr(sample, "media", ()) if medium.kind == "audio"), None)
