"""Files in a shard, found by their headers: a shard may lie about each of them, and none is believed beyond its bytes.

``tarfile`` reads one header at a time here and nothing more. Its own way from member to member takes the size of what
it reads from the shard: a long name, a table of holes, the holes themselves, of which a terabyte fits into one header.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

from omni_train.data.samples.sample import SampleError

BLOCK = 512
MOST_FILES = 10_000  # of one sample: each has a header, and takes time
LONGEST_EXTENSION = 1 << 16  # bytes of what a header has no room for: a name of 4,096 and some times
MOST_EXTENSIONS = 16  # before one file
LARGEST = 1 << 62  # bytes
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENSIONS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
RECORD = re.compile(rb"(\d{1,6}) ([^=\n]{1,100})=")  # of an extended header: its length, and a key


@dataclass(frozen=True)
class Member:
    """Member of a shard; one that is no file (a folder, a link, a device) has no ``key``."""

    key: str | None  # of the sample
    name: str  # in the sample: what follows the key and a dot
    offset: int  # of its bytes in the shard
    size: int
    end: int  # of it and what fills its last block
    holes: bool  # whether there are fewer bytes than the file has


def members(shard: BinaryIO, begin: int = 0, end: int | None = None) -> Iterator[Member]:
    """Members between two offsets of a shard, to its end mark at most.

    Raises SampleError: ``truncated_shard`` or ``broken_shard``.
    """
    at, told, extensions = begin, {}, 0
    while end is None or at < end:
        block = _read(shard, at, BLOCK)
        if not block.strip(b"\0"):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            raise SampleError("broken_shard") from None
        at += BLOCK
        extends = info.type in EXTENSIONS or info.type in LONG
        size = 0 if info.type in EMPTY else info.size if extends else told.get("size", info.size)
        extensions = extensions + 1 if extends else 0
        if not 0 <= size < (LONGEST_EXTENSION if extends else LARGEST) or extensions > MOST_EXTENSIONS:
            raise SampleError("broken_shard")
        if extends:
            body = _read(shard, at, size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                told["path"] = body.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type in EXTENSIONS[:2]:
                told |= _records(body)
            at += size + -size % BLOCK
            continue
        holes = info.type == tarfile.GNUTYPE_SPARSE or "sparse" in told
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = block[482]
            while more:  # blocks of its table of holes
                more, at = _read(shard, at, BLOCK)[504], at + BLOCK
        path, stop = told.get("path", info.name), at + size + -size % BLOCK
        found = None if skip_meta_re.match(path) else split_name_re.match(path)
        is_file = found and (holes or info.type in REGULAR)
        yield Member(found[1] if is_file else None, found[2] if is_file else path, at, size, stop, holes)
        at, told = stop, {}


def read_files(shard: BinaryIO, files: Iterable[Member], *, most: int, most_text: int) -> dict[str, bytes]:
    """Bytes of a sample's files, by their names in it; none is read that is refused.

    Raises SampleError: ``sparse_file``, ``duplicate_file``, ``too_many_files``, ``text_too_large`` for a ``key.json``
    of more than ``most_text`` bytes, ``sample_too_large`` for files of more than ``most`` bytes together,
    ``truncated_shard``.
    """
    parts: dict[str, bytes] = {}
    for member in files:
        if member.holes:
            raise SampleError("sparse_file")
        if member.name in parts:
            raise SampleError("duplicate_file")
        if len(parts) >= MOST_FILES:
            raise SampleError("too_many_files")
        if member.name == "json" and member.size > most_text:
            raise SampleError("text_too_large")
        if member.size > most:
            raise SampleError("sample_too_large")
        parts[member.name] = _read(shard, member.offset, member.size)
        most -= member.size
    return parts


def read_sample(shard: BinaryIO, begin: int, end: int, *, most: int, most_text: int) -> dict[str, bytes]:
    """Bytes of the files of the sample between two offsets, by their names in it.

    Raises SampleError as ``members`` and ``read_files``, and ``broken_shard`` for files of two samples or none."""
    return read_files(shard, _of_one_sample(shard, begin, end), most=most, most_text=most_text)


def _of_one_sample(shard: BinaryIO, begin: int, end: int) -> Iterator[Member]:
    key, last = None, begin
    for count, member in enumerate(members(shard, begin, end)):
        if count >= MOST_FILES:
            raise SampleError("too_many_files")
        last = member.end
        if member.key is None:
            continue
        if key not in (None, member.key):
            raise SampleError("broken_shard")
        key = member.key
        yield member
    if key is None or last < end:
        raise SampleError("broken_shard")


def _read(shard: BinaryIO, offset: int, size: int) -> bytes:
    shard.seek(offset)
    data = shard.read(size)
    if len(data) < size:
        raise SampleError("truncated_shard")
    return data


def _records(body: bytes) -> dict[str, str | int]:
    """Records of an extended header about the member after it: ``path``, ``size``, and ``sparse`` if it has holes."""
    told: dict[str, str | int] = {}
    at = 0
    while record := RECORD.match(body, at):
        value = body[record.end() : at + int(record[1]) - 1]
        key = record[2]
        if key == b"path":
            told["path"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            told["size"] = int(value) if value.isdigit() and len(value) < 20 else -1
        elif key.startswith(b"GNU.sparse"):
            told["sparse"] = 1
        if at + int(record[1]) < record.end():
            raise SampleError("broken_shard")
        at += int(record[1])
    return told
