"""Parsing of a sample's ``key.json``, with one short reason for whatever it must not hold.

A document is ``{"text": ..., "meta": {...}}``. A chat is ``{"messages": [{"role": ..., "content": ...}, ...], "meta":
{...}}`` in the OpenAI style: ``content`` is a string or a list of parts, each of them one of

- ``{"type": "text", "text": ...}``
- ``{"type": "audio", "audio": "0.flac"}``
- ``{"type": "image", "image": "1.jpg"}``
- ``{"type": "video", "video": "2.mp4", "sound": true}``; without ``sound`` the video is silent

where the file is the field of that name of the same key (``key.0.flac`` in the shard). Sound and video may give
``start`` and ``end`` in seconds. A message of the assistant may have ``reasoning_content``, what is thought before the
answer. ``"speech": "2.flac"`` beside ``text`` or ``messages`` names the file in which the text, or the last answer, is
spoken: what speech is learned from. Beside it ``"voice": {"speech": "3.flac", "description": "a low voice, slow",
"name": "anna"}`` says who speaks there, by one of them or more; its file is another utterance of the same speaker.
``meta`` (language, task, source, twin, ...) is optional and kept as it is. Any other key is one that was misspelt, or
something that would be lost: it is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from omni_train.data.samples.kinds import medium_kinds
from omni_train.data.samples.sample import OTHERS, Chat, Document, Medium, Sample, SampleError, Turn, Voice

ROLES = ("system", "user", "assistant")
KEYS = {"messages", "text", "speech", "voice", "meta"}
VOICE_KEYS = {"speech", "description", "name"}


def sample_in(parts: Mapping[str, bytes]) -> Sample:
    """Sample that the files of a key describe; raises SampleError as ``parse_sample``, or ``no_json``."""
    if "json" not in parts:
        raise SampleError("no_json")
    return parse_sample(parts["json"])


def parse_sample(data: bytes) -> Sample:
    """Sample of the bytes of one ``key.json``; raises SampleError as ``read_json`` and ``sample_of``."""
    return sample_of(read_json(data))


def read_json(data: bytes) -> Any:
    """Value of JSON that every reader reads alike.

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
    """Sample that the fields of a ``key.json``, or of a line of a manifest, describe.

    Raises SampleError with the reason ``unknown_schema`` (fields of another type, or text beside messages),
    ``no_messages`` (neither text nor messages), ``unknown_role``, ``unknown_part``, ``unknown_key_...``,
    ``media_in_assistant`` (an assistant turn is text), ``empty``, ``voice_without_speech`` (it says who speaks, but
    nothing is spoken), ``voice_is_speech`` (a reference that is the very speech to be learned would be copied), or the
    name of a format of others.
    """
    meta = fields.get("meta", {}) if isinstance(fields, dict) else None
    if not isinstance(meta, dict) or ("text" in fields and "messages" in fields):
        raise SampleError("unknown_schema")
    if "text" not in fields and "messages" not in fields:
        raise SampleError(OTHERS["conversations"][0] if "conversations" in fields else "no_messages")
    _refuse_unknown(fields, KEYS)
    speech = fields.get("speech")
    if speech is not None and not isinstance(speech, str):
        raise SampleError("unknown_schema")
    voice = _voice(fields.get("voice"), speech)
    if "text" in fields:
        text = _text(fields["text"])
        if not text.strip():
            raise SampleError("empty")
        return Document(text, meta, speech, voice)
    if not isinstance(fields["messages"], list):
        raise SampleError("unknown_schema")
    chat = Chat(tuple(_turn(message) for message in fields["messages"]), meta, speech, voice)
    if not any(turn.text.strip() for turn in chat.turns) and not chat.media:
        raise SampleError("empty")
    return chat


def named_files(fields: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """(object, key in it) of every file name in the fields of a sample: of messages, its speech and its voice."""
    contents = [message["content"] for message in fields.get("messages", ())]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    named = [(part, part["type"]) for part in parts if part["type"] in medium_kinds()]
    owners = (fields, fields.get("voice") or {})
    return [*named, *((owner, "speech") for owner in owners if owner.get("speech") is not None)]


def _voice(fields: Any, speech: str | None) -> Voice | None:
    """Voice of a sample whose speech is in the file ``speech``."""
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise SampleError("unknown_schema")
    _refuse_unknown(fields, VOICE_KEYS)
    said = {key: _text(value) for key, value in fields.items() if value is not None}
    if not said or not all(map(str.strip, said.values())):
        raise SampleError("unknown_schema")
    if speech is None:
        raise SampleError("voice_without_speech")
    if said.get("speech") == speech:
        raise SampleError("voice_is_speech")
    return Voice(**said)


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
    medium = medium_kinds().get(kind) if isinstance(kind, str) else None
    if medium is None:
        raise SampleError(OTHERS[kind][0] if isinstance(kind, str) and kind in OTHERS else "unknown_part")
    _refuse_unknown(part, {"type", kind, "start", "end", "sound"})
    file, sound = part.get(kind), part.get("sound", False)
    start, end = part.get("start"), part.get("end")
    timed = start is not None or end is not None
    if not isinstance(file, str) or not isinstance(sound, bool) or not _is_time(start) or not _is_time(end):
        raise SampleError("unknown_schema")
    if (sound and not medium.sounds) or (timed and not medium.timed) or (end is not None and end <= (start or 0)):
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
