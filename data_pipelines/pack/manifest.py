"""Reading of a line of the manifest: its media are read from their files, and it is tokenised as in training."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from omni_train.data.rows.chats import sequences_of
from omni_train.data.rows.room import refuse_many
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.samples.files import TooLarge, open_regular, read_whole, real_path
from omni_train.data.samples.media import decoded_seconds
from omni_train.data.samples.media.container import open_container
from omni_train.data.samples.parsing import named_files, read_json, sample_of
from omni_train.data.samples.sample import Chat, SampleError, one_sample, voice_of
from omni_train.data.samples.tokenizer import Tokenizer


@dataclass(frozen=True)
class Refused:
    """Line of the manifest that is left out."""

    line: int  # from 1
    reason: str
    files: list[str]


@dataclass
class Line:
    """Line of the manifest as a sample for a shard, with its token sequences and durations."""

    key: str
    fields: dict[str, Any]
    sequences: list[TokenSequence]
    media: dict[str, bytes] = field(default_factory=dict)
    video_seconds: float = 0.0
    speech_seconds: float = 0.0  # of the speech that the sample teaches


def read_line(number: int, data: bytes, tokenizer: Tokenizer, job) -> Line | Refused:
    """Read one line and all that it names.

    Args:
        number: number of the line, from 0; it becomes the sample's key.
        data: bytes of the line, or the first of more than ``max_text_bytes``.
        tokenizer: tokenizer of the training.
        job: :class:`omni_train.data_pipelines.pack.Job`.
    """
    paths: list[str] = []
    try:
        with one_sample():
            return _read_line(f"{number:09d}", data, tokenizer, job, paths)
    except SampleError as error:
        return Refused(number + 1, error.reason, paths)


def _read_line(key: str, data: bytes, tokenizer: Tokenizer, job, paths: list[str]) -> Line:
    if len(data.rstrip(b"\r\n")) > job.data.max_text_bytes:
        raise SampleError("text_too_large")
    fields = read_json(data)
    sample = sample_of(fields)
    if isinstance(sample, Chat):
        refuse_many(sample.turns, job.data.row_tokens, job.data.media)
    names: dict[str, str] = {}
    media: dict[str, bytes] = {}
    left = job.data.max_sample_bytes - len(data)
    for owner, what in named_files(fields):
        path = owner[what]
        if path not in names:
            names[path] = f"{len(names)}{_suffix(path)}"
            paths.append(path)
            media[names[path]] = _read(job.manifest.parent / path, job.roots, left)
            left -= len(media[names[path]])
        owner[what] = names[path]
    sample = sample_of(fields)  # once more, now with the names in the shard
    spoken = 0.0 if sample.speech is None else decoded_seconds(media[sample.speech], job.data.media)
    if (voice := voice_of(sample)) is not None:
        decoded_seconds(media[voice.file], job.data.media)
    sequences = sequences_of(sample, tokenizer, job.data, job.model, media)
    videos = {medium.file for medium in getattr(sample, "media", ()) if medium.kind == "video"}
    seconds = sum(_duration(media[name]) for name in videos)
    return Line(key, fields, sequences, media, seconds, spoken)


def _suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".bin"


def _read(path: Path, roots: Sequence[Path], most: int) -> bytes:
    """A medium. Raises SampleError ``media_missing``, ``media_unreadable``, ``sample_too_large``, or ``media_outside``
    where it lies in none of ``roots``, wherever a link or ``..`` says it does."""
    try:
        _refuse_outside(Path(os.path.realpath(path)), roots)  # a device there may not even be opened
        with open_regular(path) as file:
            _refuse_outside(real_path(file), roots)
            return read_whole(file, most)
    except FileNotFoundError:
        raise SampleError("media_missing") from None
    except TooLarge:
        raise SampleError("sample_too_large") from None
    except (OSError, ValueError):  # no permission or no file, a name that is too long or has a zero byte
        raise SampleError("media_unreadable") from None


def _refuse_outside(path: Path, roots: Sequence[Path]) -> None:
    if not any(path.is_relative_to(root) for root in roots):
        raise SampleError("media_outside")


def _duration(video: bytes) -> float:
    """Duration of a video in seconds, as the file's header says."""
    with open_container(video) as container:
        return (container.duration or 0) / av.time_base
