"""Samples: documents, and chats with media; and the error that refuses one."""

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
"""Other formats of samples, by their keys and types of parts: reason of the refusal, and advice."""
_ADVICE = dict(OTHERS.values()) | {
    "media_outside": "media that lie outside the manifest's folder: name theirs with roots=FOLDER,FOLDER",
    "unwritten_reasoning": "ChatML has no place for reasoning_content: set chat_template=qwen3_5",
}

_log = logging.getLogger(__name__)
_logged: set[str] = set()  # kinds of unexpected errors, in this process


class SampleError(Exception):
    """Error of a sample that training goes on without; ``reason`` is a short stable name, counted in the row."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def one_sample() -> Iterator[None]:
    """Context in which any error that a sample causes refuses that sample.

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
    """Reasons and counts in words, the commonest first, with advice on samples of a known format."""
    told = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        f"{reason} {count:,}{f' ({_ADVICE[reason]})' if reason in _ADVICE else ''}" for reason, count in told
    )


@dataclass(frozen=True)
class Medium:
    """File of the sample that stands in a turn; ``kind`` is one of ``medium_kinds``."""

    kind: str
    file: str
    sound: bool = False  # of a video: is its sound track heard?
    start: float | None = None  # seconds
    end: float | None = None  # seconds


@dataclass(frozen=True)
class Turn:
    """Message of a chat: texts and media in order; ``role`` is system, user or assistant."""

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
class Voice:
    """Who is to speak, by at least one of the three."""

    speech: str | None = None  # the file of another utterance of the same speaker
    description: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Document:
    """Document: a text with a loss on all of it."""

    text: str
    meta: dict[str, Any] = field(default_factory=dict)
    speech: str | None = None  # the file in which it is spoken
    voice: Voice | None = None  # who speaks there


@dataclass(frozen=True)
class Chat:
    """Chat: turns, of which ``data.loss_on`` says which have a loss."""

    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    speech: str | None = None  # the file in which the last answer is spoken
    voice: Voice | None = None  # who speaks there

    @property
    def media(self) -> tuple[Medium, ...]:
        return tuple(medium for turn in self.turns for medium in turn.media)


Sample = Document | Chat


def speech_of(sample: Sample) -> Medium | None:
    """Speech of a sample, for speech models: its speech target, else the first sound of a chat."""
    if sample.speech is not None:
        return Medium("audio", sample.speech)
    return next((medium for medium in getattr(sample, "media", ()) if medium.kind == "audio"), None)
