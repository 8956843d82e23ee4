"""A line of the manifest: its media read from their files, tokenised once as training will, or refused."""

from __future__ import annotations

import array
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from omni_train.data.chat import TokenSequence, tokenize
from omni_train.data.features.mel import SAMPLE_RATE
from omni_train.data.media import read_audio
from omni_train.data.sample import MEDIA, SampleError, parse_sample
from omni_train.data.tokenizer import Tokenizer
from omni_train.recipe.schema import LossOn


@dataclass(frozen=True)
class Refused:
    """A line that is left out."""

    line: int  # from 1
    reason: str
    files: list[str]


@dataclass
class Line:
    """A sample for a shard, and what it is made of."""

    key: str
    fields: dict[str, Any]
    sequences: list[TokenSequence]
    media: dict[str, bytes] = field(default_factory=dict)
    video_seconds: float = 0.0
    speech_seconds: float = 0.0  # of the speech that the sample teaches


def line_offsets(manifest: Path) -> array.array:
    """Where each line that is not blank begins, in bytes."""
    offsets, position = array.array("Q"), 0
    with manifest.open("rb") as file:
        for line in file:
            if line.strip():
                offsets.append(position)
            position += len(line)
    return offsets


def read_line(number: int, data: bytes, tokenizer: Tokenizer, job) -> Line | Refused:
    """Read one line and all that it names.

    Args:
        number: of the line, from 0; it becomes the sample's key.
        data: its bytes.
        tokenizer: counts its tokens.
        job: :class:`data_pipelines.pack.Job`.
    """
    paths: list[str] = []
    try:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            raise SampleError("broken_json") from None
        _refuse_unknown(fields)
        media: dict[str, bytes] = {}
        for owner, key in _named_files(fields):
            path = owner.get(key)
            if not isinstance(path, str):
                raise SampleError("unknown_schema")
            if path not in paths:
                paths.append(path)
            name = f"{paths.index(path)}{_suffix(path)}"
            media[name] = media.get(name) or _read(job.manifest.parent / path)
            owner[key] = name
        sample = parse_sample(json.dumps(fields).encode())
        spoken = [] if sample.speech is None else read_audio(media[sample.speech], job.media)
        sequences = tokenize(
            sample,
            tokenizer,
            row_tokens=job.row_tokens,
            loss_on=LossOn.assistant,
            media=job.media,
            model=job.model,
            parts=media,
        )
        videos = {medium.file for medium in getattr(sample, "media", ()) if medium.kind == "video"}
        seconds = sum(_duration(media[name]) for name in videos)
    except SampleError as error:
        return Refused(number + 1, error.reason, paths)
    return Line(f"{number:09d}", fields, sequences, media, seconds, len(spoken) / SAMPLE_RATE)


def _named_files(fields: Any) -> list[tuple[dict, str]]:
    """What names a file, and under which key: parts of messages, and the speech of the sample."""
    named = [(part, part["type"]) for part in _parts(fields) if part.get("type") in MEDIA]
    return [*named, (fields, "speech")] if isinstance(fields, dict) and fields.get("speech") is not None else named


def _parts(fields: Any) -> list[dict]:
    """The parts of all messages; what is not as it should be is left to ``parse_sample``."""
    turns = _turns(fields)
    parts = [part for turn in turns if isinstance(turn.get("content"), list) for part in turn["content"]]
    return [part for part in parts if isinstance(part, dict)]


def _turns(fields: Any) -> list[dict]:
    messages = fields.get("messages") if isinstance(fields, dict) else None
    return [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []


def _refuse_unknown(fields: Any) -> None:
    """A key that means nothing is one that was misspelt, or a medium that would be left behind."""
    allowed = [([fields] if isinstance(fields, dict) else [], {"messages", "text", "speech", "meta"})]
    allowed.append((_turns(fields), {"role", "content"}))
    for part in _parts(fields):
        kind = part.get("type")
        allowed.append(([part], {"type", kind, "start", "end", "sound"} if kind in MEDIA else {"type", "text"}))
    for owners, keys in allowed:
        for owner in owners:
            if unknown := sorted(owner.keys() - keys):
                raise SampleError(f"unknown_key_{unknown[0][:40]}")


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".bin"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SampleError("media_missing") from None
    except (OSError, ValueError):  # a directory, no permission, a name with a zero byte
        raise SampleError("media_unreadable") from None


def _duration(video: bytes) -> float:
    """Seconds, as the file's header says."""
    with av.open(io.BytesIO(video)) as container:
        return (container.duration or 0) / av.time_base
