"""A line of the manifest: its media read from their files, tokenised once as training will, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from omni_train.data.chat import TokenSequence, sequences_of
from omni_train.data.features.mel import SAMPLE_RATE
from omni_train.data.media import read_audio
from omni_train.data.media.container import open_container
from omni_train.data.sample import SampleError, named_files, one_sample, read_json, sample_of
from omni_train.data.tokenizer import Tokenizer


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
        with one_sample():
            return _read_line(f"{number:09d}", data, tokenizer, job, paths)
    except SampleError as error:
        return Refused(number + 1, error.reason, paths)


def _read_line(key: str, data: bytes, tokenizer: Tokenizer, job, paths: list[str]) -> Line:
    fields = read_json(data)
    sample_of(fields)
    media: dict[str, bytes] = {}
    for owner, what in named_files(fields):
        path = owner[what]
        if path not in paths:
            paths.append(path)
        name = f"{paths.index(path)}{_suffix(path)}"
        media[name] = media.get(name) or _read(job.manifest.parent / path)
        owner[what] = name
    sample = sample_of(fields)  # once more, now with the names in the shard
    spoken = [] if sample.speech is None else read_audio(media[sample.speech], job.data.media)
    sequences = sequences_of(sample, tokenizer, job.data, job.model, media)
    videos = {medium.file for medium in getattr(sample, "media", ()) if medium.kind == "video"}
    seconds = sum(_duration(media[name]) for name in videos)
    return Line(key, fields, sequences, media, seconds, len(spoken) / SAMPLE_RATE)


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".bin"


def _read(path: Path) -> bytes:
    try:
        if not path.is_file() and path.exists():  # a directory; a pipe or a device would never end
            raise SampleError("media_unreadable")
        return path.read_bytes()
    except FileNotFoundError:
        raise SampleError("media_missing") from None
    except (OSError, ValueError):  # no permission, a name that is too long or has a zero byte
        raise SampleError("media_unreadable") from None


def _duration(video: bytes) -> float:
    """Seconds, as the file's header says."""
    with open_container(video) as container:
        return (container.duration or 0) / av.time_base
