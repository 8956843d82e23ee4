"""What is asked: turns of a chat, from a file of messages or from a prompt and media."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni_train.data.samples.files import read_regular
from omni_train.data.samples.media import kind_of
from omni_train.data.samples.parsing import read_json, sample_of
from omni_train.data.samples.sample import Chat, Medium, SampleError, Turn
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig


def read_messages(file: Path, data: DataConfig) -> tuple[tuple[Turn, ...], dict[str, bytes]]:
    """Turns of a file as a ``key.json`` of training, and their media by name, which lie in the file's folder or below.

    Raises:
        UserError: a file cannot be read, is no chat, or ends in an answer.
    """
    try:
        sample = sample_of(read_json(_read(f"messages={file}", file, data.max_text_bytes)))
    except SampleError as error:
        raise UserError(f"messages={file}: refused as {error.reason}; write it as docs/data.md says") from None
    if not isinstance(sample, Chat):
        raise UserError(f"messages={file}: a text without messages; give text= to have it spoken")
    if sample.speech is not None:
        raise UserError(f"messages={file}: names speech to learn from; leave speech and voice out")
    if sample.turns[-1].role == "assistant":
        raise UserError(f"messages={file}: ends in an answer; end it in what is to be answered")
    most = data.max_sample_bytes
    return sample.turns, {one.file: _read(f"media={one.file}", file.parent / one.file, most) for one in sample.media}


def read_prompt(prompt: str, files: Sequence[str], data: DataConfig) -> tuple[tuple[Turn, ...], dict[str, bytes]]:
    """Turn of a user who shows sounds, images and silent videos, and then asks.

    Raises:
        UserError: a file cannot be read, or is none of these.
    """
    parts = {file: _read(f"media={file}", Path(file), data.max_sample_bytes) for file in files}
    return (Turn("user", (*(Medium(_kind(file, parts[file]), file) for file in files), prompt)),), parts


def _kind(file: str, data: bytes) -> str:
    try:
        return kind_of(data)
    except SampleError:
        raise UserError(f"media={file}: is no sound, image or video that can be read") from None


def _read(what: str, path: Path, most: int) -> bytes:
    try:
        return read_regular(path, most)
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
