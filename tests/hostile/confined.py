"""A process of little memory, in which the files of others are read: who takes more fails there, and not elsewhere."""

from __future__ import annotations

import os
import resource
from collections import Counter
from pathlib import Path

import numpy as np

from omni_train.data.rows.codes import codes_of
from omni_train.data.samples.media import read_audio, read_image, read_video
from omni_train.data.samples.sample import SampleError, one_sample
from omni_train.data.samples.sources import open_source
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.streams import sequence_reader
from omni_train.data_pipelines import codes
from omni_train.data_pipelines.copying import samples_of
from omni_train.data_pipelines.pack import Job, _shards, manifest
from omni_train.recipe.schema import DataConfig, MediaConfig, SourceConfig
from tests.data.conftest import MODEL
from tests.support.codec import MODEL as SPEAKS
from tests.support.media import image_file, sound_file, video_file

ROOM = 256 << 20  # bytes that reading may take
ROW = 4096
SECONDS = 120  # of a test; it fails by them only where the work has no end


def confine() -> None:
    """Read something of each kind, so that all libraries are there, and take no more than ROOM from then on."""
    black = np.zeros((4, 32, 32, 3), np.uint8)
    media("audio", sound_file(np.zeros((1600, 1), np.float32)))
    media("image", image_file(black[0]))
    media("video", video_file(black, sound=np.zeros((16000, 1), np.float32)))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM,) * 2)


def media(kind: str, data: bytes | str, **changes) -> str | None:
    """Why a medium, or the file of that name, is refused; None where it is read."""
    data = Path(data).read_bytes() if isinstance(data, str) else data
    bounds, vision = MediaConfig(**changes), MODEL.vision
    readers = {
        "audio": lambda: read_audio(data, bounds, most=655.0),
        "image": lambda: read_image(data, bounds, vision),
        "video": lambda: read_video(data, bounds, vision, sound=True),
    }
    return _refusal(readers[kind])


def lines(file: str, tokenizer: str, roots: tuple[str, ...] = (), row: int = ROW, **changes) -> list[str | None]:
    """What becomes of each line of a manifest."""
    path = Path(file)
    data = DataConfig(row_tokens=row, **changes)
    folders = tuple(Path(folder).resolve() for folder in (path.parent, *roots))
    job = Job(path, folders, None, Path(tokenizer), MODEL, data)
    found = []
    for _, where in _shards(path, 1000, 0.0):
        with path.open("rb") as opened:
            for number, offset in where:
                opened.seek(offset)
                line = manifest.read_line(
                    number, opened.readline(data.max_text_bytes + 2), Tokenizer(Path(tokenizer)), job
                )
                found.append(getattr(line, "reason", None))
    return found


def shard(folder: str, tokenizer: str, row: int = ROW, **changes) -> list[str | None]:
    """What becomes of each sample of a folder of shards, as training reads it."""
    data = DataConfig(row_tokens=row, **changes)
    read = sequence_reader(Tokenizer(tokenizer), data, MODEL)
    (reader,) = open_source(SourceConfig(folder), "train", training=False).build().dataset.join_readers
    return [next(read(reader[index])).refused for index in range(len(reader.reader))]


def coded(folder: str, max_seconds: float = 600.0) -> tuple[list[str], dict[str, int], list[str | None]]:
    """The samples of a shard that would get codes, those that would be left out, and why the first have none."""
    left_out: Counter[str] = Counter()
    bounds = DataConfig.max_sample_bytes, DataConfig.max_text_bytes
    codes._job = type("Job", (), {"max_seconds": max_seconds})
    codes._codec = type("Codec", (), {"sampling_rate": 24000, "encode": lambda self, wave: np.zeros((2, 1))})()
    kept = list(samples_of(Path(folder) / "train-00000.tar", *bounds, left_out))
    missing = [Counter() for _ in kept]
    for (_, parts), reasons in zip(kept, missing, strict=True):
        codes._coded(parts, reasons)
    return [key for key, _ in kept], dict(left_out), [", ".join(reasons) or None for reasons in missing]


def array(data: bytes) -> str | None:
    """Why codes are refused."""
    return _refusal(lambda: codes_of({"codes.npy": data}, SPEAKS, 100))


def _refusal(read) -> str | None:
    try:
        with one_sample():
            read()
    except SampleError as error:
        return error.reason
    return None
