"""The rehearsal: a small data set made on the spot, so that the whole pipeline runs where nothing was fetched."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from omni_train.data.samples.tokenizer import CONTROL_TOKENS
from omni_train.data_pipelines.rehearsal import kinds, tokenizer
from omni_train.data_pipelines.rehearsal.phrases import LANGUAGES
from omni_train.data_pipelines.rehearsal.world import SHARDS
from omni_train.data_pipelines.shards import index_shards
from omni_train.errors import UserError


def build(out: Path | str, vocab_size: int = 4096, samples: float = 1.0, kind: str = "", languages: str = "") -> bool:
    """Make the data set in ``out``: ``tokenizer/`` and a folder of train and val shards of each kind of sample.

    The kinds are ``text`` (documents), ``chat``, those with media (``kinds.KINDS``) and those that speak
    (``kinds.SPOKEN``), of which ``samples`` says what share is made. The same versions of Python and packages give the
    same bytes. ``out`` appears only when it is complete; a set that was made before there were kinds that speak gets
    them. With a ``kind`` with media, ``out`` holds the shards of that kind alone, and ``samples`` may be above 1; those
    of a smaller share are among them. ``languages`` (``en,fr,zh``) are those of a kind that speaks; all where none is
    named. False when all was there already. Raises UserError when ``out`` is something
    else, there is no such kind, ``vocab_size`` (control tokens included) leaves no room for bytes, or the package that
    speaks is missing.
    """
    out = Path(out)
    if importlib.util.find_spec("espeakng_loader") is None:
        raise UserError("the rehearsal's speech needs espeakng-loader; pip install 'omni_train[rehearsal]'")
    spoken = languages.split(",") if languages else list(LANGUAGES)
    if languages and (kind not in kinds.SPOKEN or not set(spoken) <= set(LANGUAGES)):
        raise UserError(
            f"languages={languages}: some of {','.join(LANGUAGES)}, of kind={' or kind='.join(kinds.SPOKEN)}"
        )
    if kind:
        return _build_kind(out, kind, samples, spoken)
    heard = ("text", "chat", *kinds.KINDS)  # what the tokenizer learns from
    missing = [name for name in (*heard, *kinds.SPOKEN) if not (out / name / ".nv-meta" / "dataset.yaml").is_file()]
    there = (out / "tokenizer" / "tokenizer.json").is_file() and not set(heard) & set(missing)
    if there and not missing:
        print(f"{out} already holds the rehearsal data set")
        return False
    if not there and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not a rehearsal data set; name another folder, or remove it")
    if vocab_size < 256 + len(CONTROL_TOKENS):
        raise UserError(
            f"vocab_size={vocab_size} must be at least {256 + len(CONTROL_TOKENS)}: bytes and control tokens"
        )
    if not 0 < samples <= 1:
        raise UserError(f"samples={samples} must be above 0 and at most 1, the share of the media that is made")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out if there else out.parent))
    try:
        _render(building, missing, samples, spoken)
        for folder in missing:
            index_shards(building / folder)
        if not there:
            tokenizer.train(_texts(building, heard), building / "tokenizer", vocab_size)
            building.chmod(0o755)
        for folder in missing if there else [""]:
            _move(building / folder, out / folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    told = ", ".join(f"{folder} {_samples(out / folder):,}" for folder in missing)
    print(f"{out}: {told}" + ("" if there else f"; {vocab_size:,} tokens"))
    return True


def _build_kind(out: Path, kind: str, samples: float, languages: Sequence[str]) -> bool:
    """Make the shards of one kind in ``out``; False when they were there already."""
    if kind not in (known := kinds.KINDS | kinds.SPOKEN):
        raise UserError(f"kind={kind}: no such kind with media; choose one of {', '.join(known)}")
    if samples <= 0:
        raise UserError(f"samples={samples} must be above 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if (out / ".nv-meta" / "dataset.yaml").is_file() and _holds(out, kind, samples, languages):
            print(f"{out} already holds the rehearsal's {kind}")
            return False
        raise UserError(f"out={out} exists and is not {samples} of the rehearsal's {kind}; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as building:
        _render(Path(building), [kind], samples, languages)
        index_shards(Path(building, kind))
        _move(Path(building, kind), out)
    print(f"{out}: {kind} {_samples(out):,}")
    return True


def _holds(folder: Path, kind: str, samples: float, languages: Sequence[str]) -> bool:
    """Whether a folder of indexed shards has as many samples as a share of a kind, and they are of that kind and, where
    it speaks, of these languages."""
    shards = sorted(folder.glob("train-*.tar"))
    if not shards or _samples(folder) != sum(SHARDS.values()) * (count := kinds.per_shard(kind, samples)):
        return False
    with tarfile.open(shards[0]) as tar:
        if (first := tar.next()) is None or not first.name.startswith(f"{kind}-train-"):
            return False
        if kind not in kinds.SPOKEN:
            return True
        fields = (json.load(tar.extractfile(member)) for member in tar.getmembers() if member.name.endswith(".json"))
        spoken = {sample["meta"]["language"] for sample in fields}
    every = count >= 8 * len(languages)  # so many samples leave no language out
    return spoken == set(languages) if every else spoken <= set(languages)


def _move(made: Path, out: Path) -> None:
    try:
        made.replace(out)
    except OSError as error:
        if not out.is_dir() or error.errno != errno.ENOTEMPTY:
            raise
        raise UserError(f"out={out}: another command wrote there meanwhile; start again to see what it is") from None


def _render(folder: Path, names: Sequence[str], samples: float, languages: Sequence[str]) -> None:
    """Write all shards of the kinds of these names, each with media by a process of its own, which makes espeak-ng's
    speech the same each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([kinds.__name__])
    waiting = [context.Process(target=kinds.write_text, args=(folder, samples))] if "text" in names else []
    for kind in (name for name in names if name not in ("text", "chat")):
        for split, shards in SHARDS.items():
            for shard in range(shards):
                job = (folder, kind, split, shard, samples, languages)
                waiting.append(context.Process(target=kinds.write, args=job, name=f"{kind}/{split}-{shard:05d}.tar"))
    waiting.reverse()
    running: dict[int, multiprocessing.Process] = {}
    try:
        while waiting or running:
            while waiting and len(running) < os.cpu_count():
                process = waiting.pop()
                process.start()
                running[process.sentinel] = process
            for sentinel in multiprocessing.connection.wait(running):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"{process.name} was not made: exit code {process.exitcode}")
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _texts(folder: Path, kinds: Iterable[str]) -> Iterator[str]:
    """The documents and all that is said in training."""
    for shard in itertools.chain.from_iterable(sorted((folder / kind).glob("train-*.tar")) for kind in kinds):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    fields = json.load(tar.extractfile(member))
                    yield from [fields["text"]] if "text" in fields else _said(fields["messages"])


def _said(messages: list[dict]) -> Iterator[str]:
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if part["type"] == "text")


def _samples(folder: Path) -> int:
    return sum(json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"].values())
