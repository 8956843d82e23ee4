"""A sample on disk: what ``key.json`` may hold, and one short word for whatever else it held.

A document is ``{"text": ..., "meta": {...}}``. A chat is ``{"messages": [{"role": ..., "content": ...}, ...], "meta":
{...}}`` in the OpenAI style: ``content`` is a string or a list of parts ``{"type": "text", "text": ...}``. ``meta``
(language, task, source, ...) is optional.
"""

from __future__ import annotations

import json
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
class Turn:
    """One message of a chat; ``role`` is one of ROLES."""

    role: str
    text: str


@dataclass(frozen=True)
class Document:
    """A text that is learned whole."""

    text: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the recipe says what is learned."""

    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)


Sample = Document | Chat


def parse_sample(data: bytes) -> Sample:
    """Read the bytes of one ``key.json``.

    Raises SampleError with the reason ``broken_json`` (not UTF-8 JSON), ``unknown_schema`` (fields of another type, or
    text beside messages), ``no_messages`` (neither text nor messages), ``unknown_role``, ``unknown_part``,
    ``media_unsupported``, or ``empty``.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError("broken_json") from None
    meta = fields.get("meta", {}) if isinstance(fields, dict) else None
    if not isinstance(meta, dict) or ("text" in fields and "messages" in fields):
        raise SampleError("unknown_schema")
    if "text" in fields:
        text = _text(fields["text"])
        if not text.strip():
            raise SampleError("empty")
        return Document(text, meta)
    if "messages" not in fields:
        raise SampleError("no_messages")
    if not isinstance(fields["messages"], list):
        raise SampleError("unknown_schema")
    turns = tuple(_turn(message) for message in fields["messages"])
    if not any(turn.text.strip() for turn in turns):
        raise SampleError("empty")
    return Chat(turns, meta)


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise SampleError("unknown_schema")
    if message.get("role") not in ROLES:
        raise SampleError("unknown_role")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return Turn(message["role"], "".join(_part(part) for part in parts))


def _part(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in MEDIA:
        raise SampleError("media_unsupported")
    if kind != "text":
        raise SampleError("unknown_part")
    return _text(part.get("text"))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError("unknown_schema")
    try:
        value.encode()  # JSON escapes can spell half a surrogate pair, which is no text
    except UnicodeEncodeError:
        raise SampleError("broken_json") from None
    return value
