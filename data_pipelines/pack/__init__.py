"""``omni-train data pack``: a manifest of samples and media files becomes indexed WebDataset shards."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipelines.making import Making
from data_pipelines.pack.manifest import Line, Refused, read_line
from data_pipelines.pack.statistics import Statistics, write_page
from data_pipelines.shards import index_shards, write_shard
from omni_train.data.sample import describe
from omni_train.data.tokenizer import Tokenizer, copy_tokenizer
from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import ChatTemplate, DataConfig, LossOn, ModelConfig


@dataclass(frozen=True)
class Job:
    """What every process needs to know."""

    manifest: Path
    making: Making
    tokenizer: Path
    model: ModelConfig
    data: DataConfig


def pack(
    manifest: Path,
    out: Path,
    tokenizer: Path,
    model: str = "flash_35b_a3b",
    row_tokens: int = 32768,
    shard_samples: int = 1000,
    val_fraction: float = 0.01,
    processes: int = 0,
    chat_template: str = "chatml",
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
        chat_template: as `data.chat_template` of the training; decides what is refused and how long samples are.

    Raises:
        UserError: no manifest, nothing in it that can be used, or ``out`` holds something else.
    """
    if not manifest.is_file() or not os.access(manifest, os.R_OK):
        raise UserError(f"manifest={manifest}: no such file, or it may not be read; give a file of JSON lines")
    if shard_samples < 1 or row_tokens < 1 or processes < 0 or not 0 <= val_fraction < 1:
        raise UserError("shard_samples and row_tokens must be at least 1, processes 0, val_fraction from 0 to below 1")
    if chat_template not in list(ChatTemplate):
        raise UserError(f"chat_template={chat_template}: must be one of {', '.join(ChatTemplate)}")
    Tokenizer(tokenizer)
    recipe = load_recipe([f"model={model}"])
    settings = {"row_tokens": row_tokens, "shard_samples": shard_samples, "val_fraction": val_fraction, "model": model}
    settings["chat_template"] = chat_template
    making = Making(out, "packed")
    making.claim(settings | {"manifest": _digest(manifest), "tokenizer": _digest(tokenizer / "tokenizer.json")})
    written = {"row_tokens": row_tokens, "chat_template": ChatTemplate(chat_template), "loss_on": LossOn.assistant}
    job = Job(manifest, making, tokenizer, recipe.model, replace(recipe.data, **written))
    shards = dict(_shards(manifest, shard_samples, val_fraction))
    if not shards:
        raise UserError(f"manifest={manifest}: not one line in it")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    making.make(_write, {name: (job, name, lines) for name, lines in shards.items()}, processes, mp_context=context)
    _finish(making, shards, tokenizer)


def _shards(manifest: Path, shard_samples: int, val_fraction: float) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Name of each shard and the (number, offset) of its lines but blank ones; a line's content decides its split."""
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "val": []}
    offset = 0
    with manifest.open("rb") as file:
        for number, line in enumerate(file):
            if line.strip():
                drawn = int.from_bytes(hashlib.blake2b(line, digest_size=4).digest()) / 2**32
                splits["val" if drawn < val_fraction else "train"].append((number, offset))
            offset += len(line)
    for split, lines in splits.items():
        for index, start in enumerate(range(0, len(lines), shard_samples)):
            yield f"{split}-{index:05d}", lines[start : start + shard_samples]


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

    partial = job.making.partial(name)
    write_shard(partial, samples())
    if statistics.samples:
        os.replace(partial, job.making.out / f"{name}.tar")
    else:
        partial.unlink()  # energon has no use for an empty shard
    job.making.record(name, {"statistics": statistics.as_dict(), "refused": refused})


def _finish(making: Making, names: Iterable[str], tokenizer: Path) -> None:
    out, total, refused = making.out, Statistics(), []
    for record in making.records(names).values():
        total.merge(record["statistics"])
        refused += record["refused"]
    with (out / "refused.jsonl").open("w", encoding="utf-8") as file:
        for line in sorted(refused, key=lambda line: line["line"]):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    reasons = Counter(line["reason"] for line in refused)
    if not total.samples:
        raise UserError(f"out={out}: every line was refused: {describe(reasons)}; see refused.jsonl")
    copy_tokenizer(tokenizer, out / "tokenizer")
    write_page(out, total, reasons)
    index_shards(out)
    told = describe(reasons) or "none"
    print(f"{out}: {total.samples:,} samples, {total.tokens:,} tokens; refused: {told}; see {out / 'statistics.md'}")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


__all__ = ["Line", "pack"]
