"""``omni-train data pack``: a manifest of samples and media files becomes indexed WebDataset shards."""

from __future__ import annotations

import codecs
import hashlib
import json
import multiprocessing
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from omni_train.data.samples.files import open_regular
from omni_train.data.samples.sample import describe
from omni_train.data.samples.tokenizer import Tokenizer, copy_tokenizer
from omni_train.data_pipelines.making import Making
from omni_train.data_pipelines.pack.manifest import Line, Refused, read_line
from omni_train.data_pipelines.pack.statistics import Statistics, write_page
from omni_train.data_pipelines.shards import index_shards, write_shard
from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import ChatTemplate, DataConfig, LossOn, ModelConfig

PIECE = 1 << 20  # bytes of a line that are in memory while its end is looked for


@dataclass(frozen=True)
class Job:
    """Settings that every process needs."""

    manifest: Path
    roots: tuple[Path, ...]  # folders in which media may lie, without links in their paths
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
    roots: str = "",
    max_sample_bytes: int = DataConfig.max_sample_bytes,
    max_text_bytes: int = DataConfig.max_text_bytes,
) -> None:
    """Pack the samples of a manifest into shards, every medium opened and decoded, with a page of statistics.

    Each line of the manifest is a JSON object like a sample's ``key.json`` (docs/data.md), its media being paths,
    relative to the manifest. What training would refuse is left out and written to ``refused.jsonl`` with its line and
    reason. The same manifest gives the same shards, whatever the number of processes. Stopped at any moment, the same
    command goes on where it was.

    Args:
        manifest: file of JSON lines.
        out: folder of the shards, their index, ``refused.jsonl``, ``statistics.md`` with its pictures, the tokenizer.
        tokenizer: folder with tokenizer.json.
        model: recipe of the model whose tokens are counted.
        row_tokens: samples longer than this are refused.
        shard_samples: lines of the manifest in one shard.
        val_fraction: share of the lines, chosen by their content, that is held out.
        processes: number of processes; 0 for one per core.
        chat_template: `data.chat_template` of the training; decides what is refused and how long samples are.
        roots: folders with commas between in which media may lie beside that of the manifest, wherever links lead to.
        max_sample_bytes: files of a sample that are larger together are refused, as `data.max_sample_bytes`.
        max_text_bytes: lines that are longer are refused, as `data.max_text_bytes`.

    Raises:
        UserError: no manifest, nothing in it that can be used, or ``out`` holds something else.
    """
    _check_manifest(manifest)
    if min(max_sample_bytes, max_text_bytes) < 1:
        raise UserError("max_sample_bytes and max_text_bytes must be at least 1")
    if shard_samples < 1 or row_tokens < 1 or processes < 0 or not 0 <= val_fraction < 1:
        raise UserError("shard_samples and row_tokens must be at least 1, processes 0, val_fraction from 0 to below 1")
    if chat_template not in list(ChatTemplate):
        raise UserError(f"chat_template={chat_template}: must be one of {', '.join(ChatTemplate)}")
    Tokenizer(tokenizer)
    recipe = load_recipe([f"model={model}"])
    settings = {"row_tokens": row_tokens, "shard_samples": shard_samples, "val_fraction": val_fraction, "model": model}
    folders = _folders(manifest, roots)
    settings |= {"chat_template": chat_template, "roots": sorted(map(str, folders[1:]))}
    limits = {"max_sample_bytes": max_sample_bytes, "max_text_bytes": max_text_bytes}
    settings |= limits
    making = Making(out, "packed")
    making.claim(settings | {"manifest": _digest(manifest), "tokenizer": _digest(tokenizer / "tokenizer.json")})
    written = {"row_tokens": row_tokens, "chat_template": ChatTemplate(chat_template), "loss_on": LossOn.assistant}
    job = Job(manifest, folders, making, tokenizer, recipe.model, replace(recipe.data, **written, **limits))
    shards = dict(_shards(manifest, shard_samples, val_fraction))
    if not shards:
        raise UserError(f"manifest={manifest}: not one line in it")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    making.make(_write, {name: (job, name, lines) for name, lines in shards.items()}, processes, mp_context=context)
    _finish(making, shards, tokenizer)


def _check_manifest(manifest: Path) -> None:
    try:
        with open_regular(manifest) as file:
            begin = file.read(2)
    except OSError as error:
        raise UserError(f"manifest={manifest}: {error.strerror}; give a file of JSON lines that may be read") from None
    if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"manifest={manifest}: is UTF-16; write it as UTF-8")


def _folders(manifest: Path, roots: str) -> tuple[Path, ...]:
    """Folders in which media may lie: that of the manifest, and those that the user names."""
    named = [Path(root) for root in roots.split(",") if root]
    for root in named:
        if not root.is_dir():
            raise UserError(f"roots={root}: no such folder; name folders in which media lie, with commas between")
    return tuple(folder.resolve() for folder in (manifest.parent, *named))


def _shards(manifest: Path, shard_samples: int, val_fraction: float) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Name of each shard and the (number, offset) of its lines but blank ones; a line's content decides its split."""
    splits = {"train": (array("q"), array("q")), "val": (array("q"), array("q"))}
    with open_regular(manifest) as file:
        for number, (offset, drawn) in enumerate(_lines(file)):
            if drawn is not None:
                numbers, offsets = splits["val" if drawn < val_fraction else "train"]
                numbers.append(number)
                offsets.append(offset)
    for split, (numbers, offsets) in splits.items():
        for index, start in enumerate(range(0, len(numbers), shard_samples)):
            part = slice(start, start + shard_samples)
            yield f"{split}-{index:05d}", list(zip(numbers[part], offsets[part], strict=True))


def _lines(file: BinaryIO) -> Iterator[tuple[int, float | None]]:
    """Offset of each line and a number from 0 to 1 that its content draws; None where there is but white space."""
    offset = 0
    while piece := file.readline(PIECE):
        drawn, blank, begin = hashlib.blake2b(piece, digest_size=4), not piece.strip(), offset
        offset += len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(PIECE)):
            drawn.update(piece)
            blank = blank and not piece.strip()
            offset += len(piece)
        yield begin, None if blank else int.from_bytes(drawn.digest()) / 2**32


def _write(job: Job, name: str, lines: list[tuple[int, int]]) -> None:
    """Make one shard and, last, the record that it is complete."""
    tokenizer, statistics, refused = Tokenizer(job.tokenizer), Statistics(), []

    def samples() -> Iterator[tuple]:
        with open_regular(job.manifest) as file:
            for number, offset in lines:
                file.seek(offset)
                line = read_line(number, file.readline(job.data.max_text_bytes + 2), tokenizer, job)
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
