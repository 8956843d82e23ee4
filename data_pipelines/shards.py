"""Writing WebDataset shards and the index that energon reads them by."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import webdataset
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

SPLITS = ("train", "val", "test")


def write_shards(folder: Path, split: str, samples: Sequence[tuple[str, dict[str, Any]]], shards: int) -> None:
    """Write ``samples``, pairs of an ASCII key without dots and the fields of its ``key.json``, to
    ``folder/split-*.tar``.

    Neighbours go to different shards, and the same samples give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{split}-{shard:05d}.tar"), mtime=0, user="", group="") as tar:
            for key, fields in samples[shard::shards]:
                tar.write({"__key__": key, "json": json.dumps(fields, ensure_ascii=False).encode()})


def index_shards(folder: Path) -> None:
    """Index a folder for energon; the part of a shard's name before the first dash is its split (train, val, test).

    What ``energon prepare`` does, without its questions. One process reads the shards, so the same ones give the same
    index.
    """
    shards = sorted(path.name for path in folder.glob("*.tar"))
    with contextlib.redirect_stdout(io.StringIO()):
        WebdatasetPreparator.prepare_dataset(
            folder, shards, split_parts_patterns=[(split, f"{split}-.*") for split in SPLITS], workers=1
        )
    meta = folder / ".nv-meta"
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    (meta / "index.uuid").write_text(str(uuid.UUID(digest(folder / name for name in shards)[:32])))


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of ``files``, in hexadecimal."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
