"""Samples of shards that are written anew, with more beside them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from omni_train.data.samples.files import open_regular
from omni_train.data.samples.members import Member, members, read_files
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.tokenizer import copy_tokenizer
from omni_train.data_pipelines.shards import index_shards
from omni_train.errors import UserError

Parts = dict[str, bytes]
"""Files of a sample by their names in it."""


def shards_of(data: Path, out: Path | None = None, workers: int = 0) -> list[str]:
    """Names of the shards of a folder, in order.

    Raises:
        UserError: there are none, ``out`` is the same folder, or a number of workers that cannot be.
    """
    shards = sorted(file.name for file in data.glob("*.tar"))
    if not shards:
        raise UserError(f"data={data}: no shards (*.tar) here; give a folder of shards")
    if workers < 0:
        raise UserError(f"workers={workers}: must be at least 0, one per core")
    if out is not None and out.resolve() == data.resolve():
        raise UserError(f"out={out}: is data itself, whose shards stay as they are; name another folder")
    return shards


def check_limits(max_seconds: float, max_sample_bytes: int, max_text_bytes: int) -> None:
    """Refuse limits under which no sample could be read.

    Raises:
        UserError: there is one.
    """
    if max_seconds <= 0 or min(max_sample_bytes, max_text_bytes) < 1:
        raise UserError("max_seconds must be above 0, max_sample_bytes and max_text_bytes at least 1")


def index_copies(data: Path, out: Path) -> None:
    """Index the shards of ``out``, and put the tokenizer of ``data`` beside them where it has one."""
    index_shards(out)
    if (data / "tokenizer").is_dir():
        copy_tokenizer(data / "tokenizer", out / "tokenizer")


def summed(records: Iterable[Mapping[str, Any]], *names: str) -> dict[str, Counter[str]]:
    """Sums of the counts of these names over the records of shards."""
    told = {name: Counter[str]() for name in names}
    for record in records:
        for name, counts in told.items():
            counts.update(record.get(name, {}))
    return told


def samples_of(
    shard: Path, most: int, most_text: int, left_out: Counter[str], without: Container[str] = ()
) -> Iterator[tuple[str, Parts]]:
    """Keys and files of a shard, whose files stand together by key.

    Args:
        shard: path of the tar.
        most: bytes of one sample.
        most_text: bytes of its ``key.json``.
        without: names of files that are left out, as others take their places.
        left_out: counter of the samples that training would refuse for their files, by reason.

    Raises:
        UserError: the shard breaks off, or is none.
    """
    for key, read in readers_of(shard, most, most_text, without):
        try:
            parts = read()
        except SampleError as error:
            left_out[error.reason] += 1
            continue
        if parts:
            yield key, parts


def readers_of(
    shard: Path, most: int, most_text: int, without: Container[str]
) -> Iterator[tuple[str, Callable[[], Parts]]]:
    """Keys of a shard as ``samples_of``, each with a function that reads its files: before the next key, or not at all.

    The function raises SampleError for a sample that training would refuse for its files, and UserError as this one.
    """

    def read(file: BinaryIO, group: Iterator[Member]) -> Parts:
        others = (member for member in group if member.name not in without)
        try:
            return read_files(file, others, most=most, most_text=most_text)
        except (SampleError, OSError) as error:
            if isinstance(error, SampleError) and error.reason not in ("broken_shard", "truncated_shard"):
                raise
            raise _broken(shard, error) from None

    try:
        with open_regular(shard) as file:
            files = (member for member in members(file) if member.key is not None)
            for key, group in itertools.groupby(files, key=lambda member: member.key):
                assert key is not None  # those without are gone
                yield key, partial(read, file, group)
    except (SampleError, OSError) as error:
        raise _broken(shard, error) from None


def _broken(shard: Path, error: Exception) -> UserError:
    return UserError(f"{shard}: not a complete tar ({error}); mend it, or take it out of the folder")
