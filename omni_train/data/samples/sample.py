"""A sample on disk: what ``key.json`` may hold, and one short word for whatever else it held.

A document is ``{"text": ..., "meta": {...}}``. A chat is ``{"messages": [{"role": ..., "content": ...}, ...], "meta":
{...}}`` in the OpenAI style: ``content`` is a string or a list of parts, each of them one of

- ``{"type": "text", "text": ...}``
- ``{"type": "audio", "audio": "0.flac"}``
- ``{"type": "image", "image": "1.jpg"}``
- ``{"type": "video", "video": "2.mp4", "sound": true}``; without ``sound`` the video is silent

where the file is the field of that name of the same key (``key.0.flac`` in the shard). Sound and video may give
``start`` and ``end`` in seconds. A message of the assistant may have ``reasoning_content``, what is thought before the
answer. ``"speech": "2.flac"`` beside ``text`` or ``messages`` names the file in which the text, or the last answer, is
spoken: what speech is learned from. ``meta`` (language, task, source, twin, ...) is optional and kept as it is. Any
other key is one that was misspelt, or something that would be lost: it is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omni_train.errors import UserError

ROLES = ("system", "user", "assistant")
MEDIA = ("audio", "image", "video")
KEYS = {"messages", "text", "speech", "meta"}

# Formats of others, by their keys and types of parts: reasons of refusal, and what is to be done.
_OTHERS = {
    "conversations": ("sharegpt_conversations", "ShareGPT: write messages of role and content instead"),
    "image_url": ("openai_image_url", "an OpenAI part: write type image and the name of a file instead"),
    "input_image": ("openai_input_image", "an OpenAI part: write type image and the name of a file instead"),
    "input_audio": ("openai_input_audio", "an OpenAI part: write type audio and the name of a file instead"),
    "audio_url": ("openai_audio_url", "a part of vLLM: write type audio and the name of a file instead"),
    "video_url": ("openai_video_url", "a part of vLLM: write type video and the name of a file instead"),
}
_ADVICE = dict(_OTHERS.values()) | {
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


def sample_in(parts: Mapping[str, bytes]) -> Sample:
    """The sample that the files of a key describe. Raises SampleError as ``parse_sample``, or ``no_json``."""
    if "json" not in parts:
        raise SampleError("no_json")
    return parse_sample(parts["json"])


def parse_sample(data: bytes) -> Sample:
    """Read the bytes of one ``key.json``. Raises SampleError as ``read_json`` and ``sample_of``."""
    return sample_of(read_json(data))


def read_json(data: bytes) -> Any:
    """JSON that every reader reads alike.

    Raises SampleError with the reason ``broken_json`` (not UTF-8 JSON, or with NaN, numbers beyond all bounds, or half
    a surrogate pair, which no text can hold) or ``duplicate_key``.
    """
    try:
        fields = json.loads(
            data.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
        if b"\\u" in data:
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise SampleError("broken_json") from None
    return fields


def sample_of(fields: Any) -> Sample:
    """The sample that these fields of a ``key.json``, or of a line of a manifest, describe.

    Raises SampleError with the reason ``unknown_schema`` (fields of another type, or text beside messages),
    ``no_messages`` (neither text nor messages), ``unknown_role``, ``unknown_part``, ``unknown_key_...``,
    ``media_in_assistant`` (an assistant turn is text), ``empty``, or the name of a format of others.
    """
    meta = fields.get("meta", {}) if isinstance(fields, dict) else None
    if not isinstance(meta, dict) or ("text" in fields and "messages" in fields):
        raise SampleError("unknown_schema")
    if "text" not in fields and "messages" not in fields:
        raise SampleError(_OTHERS["conversations"][0] if "conversations" in fields else "no_messages")
    _refuse_unknown(fields, KEYS)
    speech = fields.get("speech")
    if speech is not None and not isinstance(speech, str):
        raise SampleError("unknown_schema")
    if "text" in fields:
        text = _text(fields["text"])
        if not text.strip():
            raise SampleError("empty")
        return Document(text, meta, speech)
    if not isinstance(fields["messages"], list):
        raise SampleError("unknown_schema")
    chat = Chat(tuple(_turn(message) for message in fields["messages"]), meta, speech)
    if not any(turn.text.strip() for turn in chat.turns) and not chat.media:
        raise SampleError("empty")
    return chat


def named_files(fields: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """What names a file in the fields of a sample, and under which key: parts of messages, and the sample's speech."""
    contents = [message["content"] for message in fields.get("messages", ())]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    named = [(part, part["type"]) for part in parts if part["type"] in MEDIA]
    return [*named, (fields, "speech")] if fields.get("speech") is not None else named


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        raise SampleError("unknown_schema")
    if message.get("role") not in ROLES:
        raise SampleError("unknown_role")
    answers = message["role"] == "assistant"
    _refuse_unknown(message, {"role", "content", *(["reasoning_content"] if answers else [])})
    content, reasoning = message.get("content"), message.get("reasoning_content")
    parts = tuple(map(_part, content)) if isinstance(content, list) else (_text(content),)
    turn = Turn(message["role"], parts, None if reasoning is None else _text(reasoning))
    if turn.role == "assistant" and turn.media:
        raise SampleError("media_in_assistant")
    return turn


def _part(part: Any) -> str | Medium:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        _refuse_unknown(part, {"type", "text"})
        return _text(part.get("text"))
    if kind not in MEDIA:
        raise SampleError(_OTHERS[kind][0] if isinstance(kind, str) and kind in _OTHERS else "unknown_part")
    _refuse_unknown(part, {"type", kind, "start", "end", "sound"})
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
    return value


def _refuse_unknown(fields: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(fields.keys() - known):
        raise SampleError("unknown_key_" + re.sub(r"[^\w.-]", "_", unknown[0][:40]))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise SampleError("duplicate_key")
    return fields


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)
