"""Copying of the shards of a folder, sample by sample, by commands that add something to each sample."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

from omni_train.data.samples.files import open_regular
from omni_train.data.samples.members import members, read_files
from omni_train.data.samples.sample import SampleError
from omni_train.errors import UserError


def shards_of(data: Path, out: Path, workers: int) -> list[str]:
    """Names of the shards of a folder, in order.

    Raises:
        UserError: there are none, or ``out`` is the same folder, or a number of workers that cannot be.
    """
    shards = sorted(file.name for file in data.glob("*.tar"))
    if not shards:
        raise UserError(f"data={data}: no shards (*.tar) here; give a folder of shards")
    if workers < 0:
        raise UserError(f"workers={workers}: must be at least 0, one per core")
    if out.resolve() == data.resolve():
        raise UserError(f"out={out}: is data itself, whose shards stay as they are; name another folder")
    return shards


def samples_of(
    shard: Path, most: int, most_text: int, left_out: Counter[str], without: Container[str] = ()
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys of a shard with their files by name, which stand together.

    Args:
        shard: path of the tar.
        most: bytes of one sample; it and ``most_text`` refuse samples as training does.
        most_text: bytes of its ``key.json``.
        left_out: counter of the samples that are refused, by reason.
        without: names of files that are not read.

    Raises:
        UserError: the shard is not whole.
    """
    try:
        with open_regular(shard) as file:
            files = (member for member in members(file) if member.key is not None)
            for key, group in itertools.groupby(files, key=lambda member: member.key):
                kept = (member for member in group if member.name not in without)
                try:
                    parts = read_files(file, kept, most=most, most_text=most_text)
                except SampleError as error:
                    if error.reason in ("broken_shard", "truncated_shard"):
                        raise
                    left_out[error.reason] += 1
                    continue
                if parts:
                    yield key, parts
    except (SampleError, OSError) as error:
        raise UserError(f"{shard}: not a complete tar ({error}); mend it, or take it out of the folder") from None
