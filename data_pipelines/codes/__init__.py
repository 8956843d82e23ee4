"""``omni-train data codes``: a codec's codes beside the speech of every sample, in new shards."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipelines.making import Making, write_json
from data_pipelines.shards import index_shards, write_files
from omni_train.data.codes import CODES, RECORD
from omni_train.data.crops import read_speech
from omni_train.data.sample import SampleError, describe, one_sample, sample_in
from omni_train.data.tokenizer import copy_tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import MediaConfig


class Codec(Protocol):
    """What makes codes of speech.

    Attributes:
        content_hash: of its weights and configuration.
        sampling_rate: of what it hears, in Hz.
    """

    content_hash: str
    sampling_rate: int

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """A waveform (n,) float32 -> codes (N, frames); the same ones in every process."""
        ...


@dataclass(frozen=True)
class Job:
    """What every process needs to know."""

    data: Path
    codec: str
    making: Making
    open_codec: Callable[[str], Codec]
    content_hash: str


def extract(
    data: Path, codec: str, open_codec: Callable[[str], Codec], out: Path | None = None, workers: int = 0
) -> None:
    """Write the shards of a folder anew, with the codes of every sample's speech as ``key.codes.npy``.

    See ``docs/data.md``. Stopped at any moment, the same call goes on where it was, and the shards become the same,
    whatever the number of processes. A sample without speech, or whose speech cannot be read, is kept without codes.

    Args:
        data: folder of indexed shards; it stays as it is.
        codec: its checkpoint.
        open_codec: reads the codec, in every process; importable by name.
        out: folder of the new shards, their index and ``codec.json``; None: ``data`` with ``_codes`` after its name.
        workers: processes that work side by side; 0 for one per core.

    Raises:
        UserError: no shards, or ``out`` holds something else.
    """
    shards = sorted(file.name for file in data.glob("*.tar"))
    if not shards:
        raise UserError(f"data={data}: no shards (*.tar) here; give a folder of shards")
    if workers < 0:
        raise UserError(f"workers={workers}: must be at least 0, one per core")
    out = out or data.with_name(f"{data.name}_codes")
    if out.resolve() == data.resolve():
        raise UserError(f"out={out}: is data itself, whose shards stay as they are; name another folder")
    making = Making(out, "coded")
    job = Job(data, codec, making, open_codec, open_codec(codec).content_hash)
    making.claim({"codec": job.content_hash, "data": str(data.resolve()), "shards": shards})
    context = multiprocessing.get_context("spawn")  # a fork would share threads and the device with this process
    jobs = {name: (name,) for name in shards}
    making.make(_write, jobs, workers, mp_context=context, initializer=_open, initargs=(job,))
    _finish(job, shards)


_job: Job
_codec: Codec


def _open(job: Job) -> None:
    """In a new process: the codec, computed by one thread, so that sums are the same however many there are."""
    global _job, _codec
    import torch

    torch.set_num_threads(1)
    _job, _codec = job, job.open_codec(job.codec)


def _write(shard: str) -> None:
    """Make one shard and, last, the record that it is complete."""
    missing: Counter[str] = Counter()
    partial = _job.making.partial(shard)

    def files() -> Iterator[tuple[str, bytes]]:
        for key, parts in _samples(_job.data / shard):
            try:
                with one_sample():
                    parts[CODES] = _codes(parts)
            except SampleError as error:
                missing[error.reason] += 1
            yield from ((f"{key}.{name}", data) for name, data in parts.items())

    write_files(partial, files())
    os.replace(partial, _job.making.out / shard)
    _job.making.record(shard, {"codec": _codec.content_hash, "missing": missing})


@contextlib.contextmanager
def _whole(shard: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"{shard}: not a complete tar ({error}); mend it, or take it out of the folder") from None


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and files of a shard, whose files stand together by key."""
    key, parts = None, {}
    with _whole(shard), tarfile.open(shard) as tar:
        for member in tar:
            if not member.isfile():
                continue
            its_key, _, name = member.name.partition(".")
            if its_key != key and parts:
                yield key, parts
                parts = {}
            key = its_key
            if name != CODES:  # another codec's, which these replace
                parts[name] = tar.extractfile(member).read()
    if parts:
        yield key, parts


def _codes(parts: dict[str, bytes]) -> bytes:
    waveform = read_speech(sample_in(parts), parts, MediaConfig(), _codec.sampling_rate)
    codes = np.asarray(_codec.encode(waveform))
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.uint16))
    return buffer.getvalue()


def _finish(job: Job, shards: list[str]) -> None:
    out, records = job.making.out, job.making.records(shards)
    index_shards(out)
    if (job.data / "tokenizer").is_dir():
        copy_tokenizer(job.data / "tokenizer", out / "tokenizer")
    whose = {shard: record["codec"] for shard, record in records.items()}
    write_json(out / RECORD, {"codec": job.content_hash, "shards": whose})  # last: until then it has no codes
    missing: Counter[str] = Counter()
    for record in records.values():
        missing.update(record["missing"])
    told = describe(missing) or "none"
    print(f"{out}: codes of {job.content_hash[:12]}… in {len(shards):,} shards; without codes: {told}")
