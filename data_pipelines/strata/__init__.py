"""``omni-train data strata``: scores of every sample's speech in its ``meta.quality``, in new shards."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from omni_train.data.rows.codes import MAX_SECONDS
from omni_train.data.rows.crops import read_speech, spoken_file
from omni_train.data.rows.utterances import transcript_of
from omni_train.data.samples.files import read_regular
from omni_train.data.samples.media.audio import sampling_rate_of
from omni_train.data.samples.parsing import read_json, sample_of
from omni_train.data.samples.sample import SampleError, describe, one_sample
from omni_train.data.samples.strata import QUALITY
from omni_train.data_pipelines.copying import check_limits, index_copies, samples_of, shards_of, summed
from omni_train.data_pipelines.making import Making
from omni_train.data_pipelines.shards import write_files
from omni_train.data_pipelines.strata.page import write_page
from omni_train.recipe.schema import DataConfig, MediaConfig

HIGHEST_RATE = 48000
"""Sampling rate in Hz above which speech is resampled before it is measured."""
LARGEST_RECORD = 1 << 30  # bytes of a file beside the shards
DIGITS = 4  # of a score behind the point


@dataclass(frozen=True)
class Speech:
    """Speech of a sample.

    Attributes:
        waveform: (n,) float32.
        sampling_rate: in Hz, as the file has it.
        text: what is said; None where the sample does not tell.
        meta: of the sample.
    """

    waveform: np.ndarray
    sampling_rate: int
    text: str | None
    meta: Mapping[str, Any]


class Judge(Protocol):
    """Measures of speech.

    Attributes:
        settings: what the scores depend on beside the speech.
    """

    settings: dict[str, Any]

    def __call__(self, speech: Speech) -> dict[str, float | str]:
        """Scores by name, the same ones in every process; the reason in place of one that cannot be measured."""
        ...


@dataclass(frozen=True)
class Job:
    """Settings that every process needs."""

    data: Path
    making: Making
    open_judge: Callable[[], Judge]
    max_seconds: float
    max_sample_bytes: int
    max_text_bytes: int


def score(
    data: Path,
    open_judge: Callable[[], Judge],
    out: Path | None = None,
    workers: int = 0,
    max_seconds: float = MAX_SECONDS,
    max_sample_bytes: int = DataConfig.max_sample_bytes,
    max_text_bytes: int = DataConfig.max_text_bytes,
) -> None:
    """Write the shards of a folder anew, with the scores of every sample's speech in its ``meta.quality``.

    See ``docs/data.md``. Stopped at any moment, the same call goes on where it was, and the shards become the same,
    whatever the number of processes. A sample whose speech cannot be read is kept as it is; one that training would
    refuse for its files is left out.

    Args:
        data: folder of indexed shards; it stays as it is.
        open_judge: function that opens what measures, in every process; importable by name.
        out: folder of the new shards, their index and ``strata.md``; None: ``data`` with ``_strata`` after its name.
        workers: processes that work side by side; 0 for one per core.
        max_seconds: longer speech is kept without scores.
        max_sample_bytes: samples of more bytes are left out, as in a training with this `data.max_sample_bytes`.
        max_text_bytes: samples whose ``key.json`` has more bytes are left out, as with this `data.max_text_bytes`.

    Raises:
        UserError: no shards, or ``out`` holds something else.
    """
    check_limits(max_seconds, max_sample_bytes, max_text_bytes)
    out = out or data.with_name(f"{data.name}_strata")
    shards = shards_of(data, out, workers)
    making = Making(out, "scored")
    limits = {"max_seconds": max_seconds, "max_sample_bytes": max_sample_bytes, "max_text_bytes": max_text_bytes}
    making.claim({"data": str(data.resolve()), "shards": shards} | limits | open_judge().settings)
    job = Job(data, making, open_judge, **limits)
    context = multiprocessing.get_context("spawn")  # a fork would share threads and the device with this process
    jobs = {name: (name,) for name in shards}
    making.make(_write, jobs, workers, mp_context=context, initializer=_open, initargs=(job,))
    _finish(job, shards)


_job: Job
_judge: Judge


def _open(job: Job) -> None:
    """Open what measures in a new process, with one thread, so that sums do not depend on the number of processes."""
    global _job, _judge
    import torch

    torch.set_num_threads(1)
    _job, _judge = job, job.open_judge()


def _write(shard: str) -> None:
    """Make one shard and, last, the record that it is complete."""
    samples, unscored, left_out, unmeasured = 0, Counter[str](), Counter[str](), Counter[str]()
    scores: dict[str, list[float]] = {}
    partial = _job.making.partial(shard)

    def files() -> Iterator[tuple[str, bytes]]:
        nonlocal samples
        for key, parts in samples_of(_job.data / shard, _job.max_sample_bytes, _job.max_text_bytes, left_out):
            samples += 1
            try:
                with one_sample():
                    fields, found = _scored(parts)
            except SampleError as error:
                unscored[error.reason] += 1
            else:
                known = {name: round(value, DIGITS) for name, value in found.items() if not isinstance(value, str)}
                unmeasured.update(f"{name}: {why}" for name, why in found.items() if isinstance(why, str))
                for name, value in known.items():
                    scores.setdefault(name, []).append(value)
                fields["meta"] = fields.get("meta", {}) | {QUALITY: known}
                parts["json"] = json.dumps(fields, ensure_ascii=False).encode()
            yield from ((f"{key}.{name}", content) for name, content in parts.items())

    write_files(partial, files())
    os.replace(partial, _job.making.out / shard)
    counts = {"unscored": unscored, "unmeasured": unmeasured, "left_out": left_out}
    _job.making.record(shard, {"samples": samples, "scores": scores} | counts)


def _scored(parts: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, float | str]]:
    """Fields of a sample's ``key.json``, and the scores of its speech."""
    if "json" not in parts:
        raise SampleError("no_json")
    fields = read_json(parts["json"])
    sample, media = sample_of(fields), MediaConfig(max_audio_seconds=_job.max_seconds)
    rate = min(sampling_rate_of(parts[spoken_file(sample, parts).file]), HIGHEST_RATE)
    waveform = read_speech(sample, parts, media, rate)
    return fields, _judge(Speech(waveform, rate, transcript_of(sample), sample.meta))


def _finish(job: Job, shards: list[str]) -> None:
    out, records = job.making.out, job.making.records(shards)
    samples, scores = 0, dict[str, list[float]]()
    told = summed(records.values(), "unscored", "unmeasured", "left_out")
    for record in records.values():
        samples += record["samples"]
        for name, values in record["scores"].items():
            scores.setdefault(name, []).extend(values)
    index_copies(job.data, out)
    write_page(out, samples, scores, told)
    for file in sorted(job.data.glob("*.json")):  # last: codec.json says that the codes are there
        (out / file.name).write_bytes(read_regular(file, LARGEST_RECORD))
    unscored, left_out = describe(told["unscored"]), describe(told["left_out"])
    print(
        f"{out}: scores in {len(shards):,} shards, see strata.md; without scores: {unscored or 'none'}"
        + (f"; left out: {left_out}" if left_out else "")
    )
