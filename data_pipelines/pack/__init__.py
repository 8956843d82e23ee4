"""``omni-train data pack``: a manifest of samples and media files becomes indexed WebDataset shards."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import track

from data_pipelines.pack.manifest import Line, Refused, line_offsets, read_line
from data_pipelines.pack.statistics import Statistics, write_page
from data_pipelines.shards import index_shards, write_shard
from omni_train.data.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import MediaConfig, ModelConfig

_DONE = ".packed"
"""Folder with one file per finished shard: its statistics and what was refused. A shard without it is made again."""


@dataclass(frozen=True)
class Job:
    """What every process needs to know."""

    manifest: Path
    out: Path
    tokenizer: Path
    model: ModelConfig
    media: MediaConfig
    row_tokens: int


def pack(
    manifest: Path,
    out: Path,
    tokenizer: Path,
    model: str = "flash_35b_a3b",
    row_tokens: int = 32768,
    shard_samples: int = 1000,
    val_fraction: float = 0.01,
    processes: int = 0,
) -> None:
    """Pack the samples of a manifest into shards, every medium opened and decoded, with a page of statistics.

    Each line of the manifest is a JSON object like a sample's ``key.json`` (docs/data.md), its media being paths,
    relative to the manifest. What training would refuse is left out and written to ``refused.jsonl`` with its line and
    reason. The same manifest gives the same shards, whatever the number of processes. Stopped at any moment, the same
    command goes on where it was.

    Args:
        manifest: JSON lines.
        out: folder of the shards, their index, ``refused.jsonl``, ``statistics.md`` with its pictures, the tokenizer.
        tokenizer: folder with tokenizer.json.
        model: recipe of the model whose tokens are counted.
        row_tokens: samples longer than this are refused.
        shard_samples: lines of the manifest in one shard.
        val_fraction: share of the lines, chosen by their content, that is held out.
        processes: that work side by side; 0 for one per core.

    Raises:
        UserError: no manifest, nothing in it that can be used, or ``out`` holds something else.
    """
    if not manifest.is_file():
        raise UserError(f"manifest={manifest}: no such file; give a file of JSON lines")
    if shard_samples < 1 or row_tokens < 1 or processes < 0 or not 0 <= val_fraction < 1:
        raise UserError("shard_samples and row_tokens must be at least 1, processes 0, val_fraction from 0 to below 1")
    Tokenizer(tokenizer)
    recipe = load_recipe([f"model={model}"])
    settings = {"row_tokens": row_tokens, "shard_samples": shard_samples, "val_fraction": val_fraction, "model": model}
    _claim(out, settings | {"manifest": _digest(manifest), "tokenizer": _digest(tokenizer / "tokenizer.json")})
    job = Job(manifest, out, tokenizer, recipe.model, recipe.data.media, row_tokens)
    shards = list(_shards(line_offsets(manifest), manifest, shard_samples, val_fraction))
    if not shards:
        raise UserError(f"manifest={manifest}: not one line in it")
    todo = [shard for shard in shards if not _record(out, shard[0]).exists()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
            futures = [pool.submit(_write, job, name, offsets) for name, offsets in todo]
            for future in track(as_completed(futures), "packing", total=len(futures)):
                future.result()
    except BrokenProcessPool:
        raise UserError(f"out={out}: a process was killed (memory?); the same command goes on from here") from None
    _finish(out, [name for name, _ in shards], tokenizer)


def _claim(out: Path, settings: dict) -> None:
    """Say in ``out`` what is packed there, or refuse a folder that holds something else."""
    note = out / _DONE / "settings.json"
    if note.exists():
        before = json.loads(note.read_text())
        for key, value in settings.items():
            if before.get(key) != value:
                raise UserError(f"out={out}: packed there with another {key}; name another folder, or remove it")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out} is not empty and was not packed by this command; name another folder")
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps(settings, indent=2) + "\n")


def _shards(
    offsets: list[int], manifest: Path, shard_samples: int, val_fraction: float
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Name of each shard and the (number, offset) of its lines; a line's content decides its split."""
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
    with manifest.open("rb") as file:
        for number, offset in enumerate(offsets):
            file.seek(offset)
            drawn = int.from_bytes(hashlib.blake2b(file.readline(), digest_size=4).digest()) / 2**32
            splits["val" if drawn < val_fraction else "train"].append((number, offset))
    for split, lines in splits.items():
        for index, start in enumerate(range(0, len(lines), shard_samples)):
            yield f"{split}-{index:05d}", lines[start : start + shard_samples]


def _record(out: Path, name: str) -> Path:
    return out / _DONE / f"{name}.json"


def _write(job: Job, name: str, lines: list[tuple[int, int]]) -> None:
    """Make one shard and, last, the record that it is complete."""
    tokenizer, statistics, refused = Tokenizer(job.tokenizer), Statistics(), []

    def samples() -> Iterator[tuple]:
        with job.manifest.open("rb") as file:
            for number, offset in lines:
                file.seek(offset)
                line = read_line(number, file.readline(), tokenizer, job)
                if isinstance(line, Refused):
                    refused.append(asdict(line))
                else:
                    statistics.add(line)
                    yield line.key, line.fields, line.media

    partial = job.out / _DONE / f"{name}.partial"
    write_shard(partial, samples())
    if statistics.samples:
        os.replace(partial, job.out / f"{name}.tar")
    else:
        partial.unlink()  # energon has no use for an empty shard
    record = _record(job.out, name)
    record.with_suffix(".new").write_text(json.dumps({"statistics": statistics.as_dict(), "refused": refused}))
    os.replace(record.with_suffix(".new"), record)


def _finish(out: Path, names: list[str], tokenizer: Path) -> None:
    total, refused = Statistics(), []
    for name in names:
        record = json.loads(_record(out, name).read_text())
        total.merge(record["statistics"])
        refused += record["refused"]
    with (out / "refused.jsonl").open("w") as file:
        for line in sorted(refused, key=lambda line: line["line"]):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    reasons: dict[str, int] = {}
    for line in refused:
        reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
    if not total.samples:
        raise UserError(f"out={out}: every line was refused ({reasons}); see refused.jsonl")
    shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    write_page(out, total, reasons)
    index_shards(out)
    told = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items())) or "none"
    print(f"{out}: {total.samples:,} samples, {total.tokens:,} tokens; refused: {told}; see {out / 'statistics.md'}")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


__all__ = ["Line", "pack"]
