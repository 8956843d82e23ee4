"""Writer of WebDataset shards and of the index that energon reads them by."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

SPLITS = ("train", "val", "test")


def write_shards(folder: Path, split: str, samples: Sequence[tuple], shards: int) -> None:
    """Write ``samples`` (see ``write_shard``) to ``folder/split-*.tar``; neighbours go to different shards."""
    for shard in range(shards):
        write_shard(folder / f"{split}-{shard:05d}.tar", samples[shard::shards])


def write_shard(file: Path, samples: Iterable[tuple]) -> None:
    """Write one tar of samples; the same samples give the same bytes.

    Args:
        file: path of the tar.
        samples: for each an ASCII key without dots, the fields of its ``key.json``, and, where it has media, a mapping
            of their names to bytes (``{"0.flac": ...}`` becomes ``key.0.flac``).
    """

    def files() -> Iterator[tuple[str, bytes]]:
        for key, fields, *media in samples:
            parts = {"json": json.dumps(fields, ensure_ascii=False).encode()} | dict(*media)
            yield from ((f"{key}.{name}", data) for name, data in parts.items())

    write_files(file, files())


def write_files(file: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write one tar of ``files``, names and contents; the same ones give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in files:
            add_file(tar, name, data)


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to a tar; the same files in the same order give the same bytes."""
    member = tarfile.TarInfo(name)  # without owner and time
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def index_shards(folder: Path) -> None:
    """Index a folder for energon; the part of a shard's name before the first dash is its split (train, val, test).

    What ``energon prepare`` does, without its questions. One process reads the shards, so the same ones give the same
    index.
    """
    from omni_train.data.workers import Worker, end  # with torch: not for those who write

    indexer = Worker(_index, folder)
    try:
        indexer.receive()
    except EOFError:
        raise RuntimeError(f"{folder}: the shards could not be indexed; what went wrong is above") from None
    finally:
        end([indexer])


def _index(done: socket.socket, folder: Path) -> None:
    """Index a folder, in a process without threads, as energon forks another."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    from omni_train.data import transfer

    shards = sorted(path.name for path in folder.glob("*.tar"))
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder, shards, split_parts_patterns=[(split, f"{split}-.*") for split in SPLITS], workers=1
        )
    meta = folder / ".nv-meta"
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    (meta / "index.uuid").write_text(str(uuid.UUID(digest(folder / name for name in shards)[:32])))
    transfer.send(done, None)


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of ``files``, in hexadecimal."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
