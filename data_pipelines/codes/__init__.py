"""``omni-train data codes``: a codec's codes beside the speech of every sample and its voice's, in new shards."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from omni_train.data.rows.codes import CODES, MAX_SECONDS, REASONS, RECORD, VOICE_CODES
from omni_train.data.rows.crops import read_speech, read_voice
from omni_train.data.samples.parsing import sample_in
from omni_train.data.samples.sample import SampleError, describe, one_sample, voice_of
from omni_train.data_pipelines.copying import check_limits, index_copies, samples_of, shards_of, summed
from omni_train.data_pipelines.making import Making, write_json
from omni_train.data_pipelines.shards import write_files
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
    samples: int


def extract(
    data: Path,
    codec: str,
    open_codec: Callable[[str], Codec],
    out: Path | None = None,
    workers: int = 0,
    max_seconds: float = MAX_SECONDS,
    max_sample_bytes: int = DataConfig.max_sample_bytes,
    max_text_bytes: int = DataConfig.max_text_bytes,
    samples: int = 0,
) -> None:
    """Write the shards of a folder anew, with ``key.codes.npy`` and ``key.voice.codes.npy``, the codes of every
    sample's speech and of the reference utterance of its voice.

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
        samples: samples that are taken of each shard, from its first; 0 for all.

    Raises:
        UserError: no shards, or ``out`` holds something else.
    """
    check_limits(max_seconds, max_sample_bytes, max_text_bytes)
    out = out or data.with_name(f"{data.name}_codes")
    shards = shards_of(data, out, workers)
    making = Making(out, "coded")
    if samples < 0:
        raise UserError(f"samples={samples}: must be at least 0, all of a shard")
    limits = {
        "max_seconds": max_seconds,
        "max_sample_bytes": max_sample_bytes,
        "max_text_bytes": max_text_bytes,
        "samples": samples,
    }
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
        limits = (_job.max_sample_bytes, _job.max_text_bytes)
        # Without the codes of another codec, which these replace.
        found = samples_of(_job.data / shard, *limits, left_out, without=[*REASONS])
        for key, parts in itertools.islice(found, _job.samples or None):
            parts |= _coded(parts, missing)
            yield from ((f"{key}.{name}", data) for name, data in parts.items())

    write_files(partial, files())
    os.replace(partial, _job.making.out / shard)
    _job.making.record(shard, {"codec": _codec.content_hash, "missing": missing, "left_out": left_out})


def _coded(parts: dict[str, bytes], missing: Counter[str]) -> dict[str, bytes]:
    """Files of codes of a sample by their names; ``missing`` counts what has none by reason."""
    media = MediaConfig(max_audio_seconds=_job.max_seconds)
    coded: dict[str, bytes] = {}
    try:
        with one_sample():
            sample = sample_in(parts)
    except SampleError as error:
        missing[error.reason] += 1
        return coded
    readers = {CODES: read_speech} | ({VOICE_CODES: read_voice} if voice_of(sample) is not None else {})
    for name, read in readers.items():
        try:
            with one_sample():
                buffer = io.BytesIO()
                codes = np.asarray(_codec.encode(read(sample, parts, media, _codec.sampling_rate)))
                np.save(buffer, codes.astype(np.uint16))
                coded[name] = buffer.getvalue()
        except SampleError as error:
            missing[REASONS[name] + error.reason] += 1
    return coded


def _finish(job: Job, shards: list[str]) -> None:
    out, records = job.making.out, job.making.records(shards)
    index_copies(job.data, out)
    whose = {shard: record["codec"] for shard, record in records.items()}
    write_json(out / RECORD, {"codec": job.content_hash, "shards": whose})  # last: until then it has no codes
    missing, left_out = map(describe, summed(records.values(), "missing", "left_out").values())
    print(
        f"{out}: codes of {job.content_hash[:12]}… in {len(shards):,} shards; without codes: {missing or 'none'}"
        + (f"; left out: {left_out}" if left_out else "")
    )
