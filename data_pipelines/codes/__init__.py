"""``omni-train data codes``: a codec's codes beside the speech of every sample, in new shards."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from omni_train.data.rows.codes import CODES, MAX_SECONDS, RECORD
from omni_train.data.rows.crops import read_speech
from omni_train.data.samples.parsing import sample_in
from omni_train.data.samples.sample import SampleError, describe, one_sample
from omni_train.data.samples.tokenizer import copy_tokenizer
from omni_train.data_pipelines.copying import samples_of, shards_of
from omni_train.data_pipelines.making import Making, write_json
from omni_train.data_pipelines.shards import index_shards, write_files
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, MediaConfig


class Codec(Protocol):
    """Codec that encodes speech.

    Attributes:
        content_hash: hash of its weights and configuration.
        sampling_rate: of the waveforms that it encodes, in Hz.
    """

    content_hash: str
    sampling_rate: int

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """Codes (N, frames) of a waveform (n,) float32; the same ones in every process."""
        ...


@dataclass(frozen=True)
class Job:
    """Settings that every process needs."""

    data: Path
    codec: str
    making: Making
    open_codec: Callable[[str], Codec]
    content_hash: str
    max_seconds: float
    max_sample_bytes: int
    max_text_bytes: int


def extract(
    data: Path,
    codec: str,
    open_codec: Callable[[str], Codec],
    out: Path | None = None,
    workers: int = 0,
    max_seconds: float = MAX_SECONDS,
    max_sample_bytes: int = DataConfig.max_sample_bytes,
    max_text_bytes: int = DataConfig.max_text_bytes,
) -> None:
    """Write the shards of a folder anew, with the codes of every sample's speech as ``key.codes.npy``.

    See ``docs/data.md``. Stopped at any moment, the same call goes on where it was, and the shards become the same,
    whatever the number of processes. A sample without speech, or whose speech cannot be read, is kept without codes;
    one that training would refuse for its files is left out.

    Args:
        data: folder of indexed shards; it stays as it is.
        codec: checkpoint of the codec.
        open_codec: function that reads the codec, in every process; importable by name.
        out: folder of the new shards, their index and ``codec.json``; None: ``data`` with ``_codes`` after its name.
        workers: processes that work side by side; 0 for one per core.
        max_seconds: longer speech is kept without codes.
        max_sample_bytes: samples of more bytes are left out, as in a training with this `data.max_sample_bytes`.
        max_text_bytes: samples whose ``key.json`` has more bytes are left out, as with this `data.max_text_bytes`.

    Raises:
        UserError: no shards, or ``out`` holds something else.
    """
    if max_seconds <= 0 or min(max_sample_bytes, max_text_bytes) < 1:
        raise UserError("max_seconds must be above 0, max_sample_bytes and max_text_bytes at least 1")
    shards = shards_of(data)
    if workers < 0:
        raise UserError(f"workers={workers}: must be at least 0, one per core")
    out = out or data.with_name(f"{data.name}_codes")
    if out.resolve() == data.resolve():
        raise UserError(f"out={out}: is data itself, whose shards stay as they are; name another folder")
    making = Making(out, "coded")
    limits = {"max_seconds": max_seconds, "max_sample_bytes": max_sample_bytes, "max_text_bytes": max_text_bytes}
    job = Job(data, codec, making, open_codec, open_codec(codec).content_hash, **limits)
    making.claim({"codec": job.content_hash, "data": str(data.resolve()), "shards": shards} | limits)
    context = multiprocessing.get_context("spawn")  # a fork would share threads and the device with this process
    jobs = {name: (name,) for name in shards}
    making.make(_write, jobs, workers, mp_context=context, initializer=_open, initargs=(job,))
    _finish(job, shards)


_job: Job
_codec: Codec


def _open(job: Job) -> None:
    """Open the codec in a new process, with one thread, so that sums do not depend on the number of processes."""
    global _job, _codec
    import torch

    torch.set_num_threads(1)
    _job, _codec = job, job.open_codec(job.codec)


def _write(shard: str) -> None:
    """Make one shard and, last, the record that it is complete."""
    missing: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    partial = _job.making.partial(shard)

    def files() -> Iterator[tuple[str, bytes]]:
        limits = _job.max_sample_bytes, _job.max_text_bytes
        for key, parts in samples_of(_job.data / shard, *limits, {CODES}, left_out):
            try:
                with one_sample():
                    parts[CODES] = _codes(parts)
            except SampleError as error:
                missing[error.reason] += 1
            yield from ((f"{key}.{name}", data) for name, data in parts.items())

    write_files(partial, files())
    os.replace(partial, _job.making.out / shard)
    _job.making.record(shard, {"codec": _codec.content_hash, "missing": missing, "left_out": left_out})


def _codes(parts: dict[str, bytes]) -> bytes:
    media = MediaConfig(max_audio_seconds=_job.max_seconds)
    waveform = read_speech(sample_in(parts), parts, media, _codec.sampling_rate)
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
    told = {what: Counter() for what in ("missing", "left_out")}
    for record in records.values():
        for what, counts in told.items():
            counts.update(record.get(what, {}))
    missing, left_out = map(describe, told.values())
    print(
        f"{out}: codes of {job.content_hash[:12]}… in {len(shards):,} shards; without codes: {missing or 'none'}"
        + (f"; left out: {left_out}" if left_out else "")
    )
