"""A sample on disk: what ``key.json`` may hold, and one short word for whatever else it held.

A document is ``{"text": ..., "meta": {...}}``. A chat is ``{"messages": [{"role": ..., "content": ...}, ...], "meta":
{...}}`` in the OpenAI style: ``content`` is a string or a list of parts, each of them one of

- ``{"type": "text", "text": ...}``
- ``{"type": "audio", "audio": "0.flac"}``
- ``{"type": "image", "image": "1.jpg"}``
- ``{"type": "video", "video": "2.mp4", "sound": true}``; without ``sound`` the video is silent

where the file is the field of that name of the same key (``key.0.flac`` in the shard). Sound and video may give
``start`` and ``end`` in seconds. ``"speech": "2.flac"`` beside ``text`` or ``messages`` names the file in which the
text, or the last answer, is spoken: what speech is learned from. ``meta`` (language, task, source, twin, ...) is
optional and kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant")
MEDIA = ("audio", "image", "video")


class SampleError(Exception):
    """A sample that training goes on without. ``reason`` is a short stable name, counted in ``PackedBatch.skipped``."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Medium:
    """A file of the sample that stands in a turn; ``kind`` is one of MEDIA."""

    kind: str
    file: str
    sound: bool = False  # of a video: is its sound track heard?
    start: float | None = None  # seconds
    end: float | None = None  # seconds


@dataclass(frozen=True)
class Turn:
    """One message of a chat: texts and media in order; ``role`` is one of ROLES."""

    role: str
    parts: tuple[str | Medium, ...]

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


def sample_in(parts: Mapping[str, bytes]) -> Sample:
    """The sample that the files of a key describe. Raises SampleError as ``parse_sample``, or ``no_json``."""
    if "json" not in parts:
        raise SampleError("no_json")
    return parse_sample(parts["json"])


def parse_sample(data: bytes) -> Sample:
    """Read the bytes of one ``key.json``.

    Raises SampleError with the reason ``broken_json`` (not UTF-8 JSON), ``unknown_schema`` (fields of another type, or
    text beside messages), ``no_messages`` (neither text nor messages), ``unknown_role``, ``unknown_part``,
    ``media_in_assistant`` (an assistant turn is text), or ``empty``.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError("broken_json") from None
    meta = fields.get("meta", {}) if isinstance(fields, dict) else None
    if not isinstance(meta, dict) or ("text" in fields and "messages" in fields):
        raise SampleError("unknown_schema")
    speech = fields.get("speech")
    if speech is not None and not isinstance(speech, str):
        raise SampleError("unknown_schema")
    if "text" in fields:
        text = _text(fields["text"])
        if not text.strip():
            raise SampleError("empty")
        return Document(text, meta, speech)
    if "messages" not in fields:
        raise SampleError("no_messages")
    if not isinstance(fields["messages"], list):
        raise SampleError("unknown_schema")
    chat = Chat(tuple(_turn(message) for message in fields["messages"]), meta, speech)
    if not any(turn.text.strip() for turn in chat.turns) and not chat.media:
        raise SampleError("empty")
    return chat


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise SampleError("unknown_schema")
    if message.get("role") not in ROLES:
        raise SampleError("unknown_role")
    content = message.get("content")
    turn = Turn(message["role"], tuple(map(_part, content)) if isinstance(content, list) else (_text(content),))
    if turn.role == "assistant" and turn.media:
        raise SampleError("media_in_assistant")
    return turn


def _part(part: Any) -> str | Medium:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"))
    if kind not in MEDIA:
        raise SampleError("unknown_part")
    file, sound = part.get(kind), part.get("sound", False)
    start, end = part.get("start"), part.get("end")
    timed = start is not None or end is not None
    if not isinstance(file, str) or not isinstance(sound, bool) or not _is_time(start) or not _is_time(end):
        raise SampleError("unknown_schema")
    if (sound and kind != "video") or (timed and kind == "image") or (end is not None and end <= (start or 0)):
        raise SampleError("unknown_schema")
    return Medium(kind, file, sound, start, end)


def _is_time(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < 1e9)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError("unknown_schema")
    try:
        value.encode()  # JSON escapes can spell half a surrogate pair, which is no text
    except UnicodeEncodeError:
        raise SampleError("broken_json") from None
    return value
