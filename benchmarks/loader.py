"""Speed of the loader against a bare loop, on the rehearsal's shards and media as large as real ones, a process each.

The bare loop is what a person would write first: ``webdataset`` over the same shards, each file decoded whole by
soundfile, Pillow or PyAV (one thread), and nothing made of it. Ours also shuffles, samples frames, computes log-mel
frames and patches, tokenises, and packs. Folder by folder they take turns, so that a busy machine slows both.
Packing is measured on the mix of ``data=rehearsal_omni`` in rows of 32,768 tokens.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import webdataset
from PIL import Image

from benchmarks import media
from omni_train.data.stream.loader import build_loader
from omni_train.data_pipelines.rehearsal import build
from omni_train.data_pipelines.rehearsal.kinds import KINDS
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import Recipe, SourceConfig

ROW_TOKENS = 32768
ROWS = 12  # of the mix
ALIGNMENT = 2  # without context parallelism
SHARE = 0.1  # of the rehearsal's media
SOUND, IMAGE, VIDEO = {"flac", "wav", "mp3", "ogg"}, {"jpg", "png", "webp"}, {"mp4", "webm", "mkv"}


def bare(folder: Path, *, sound: bool) -> int:
    """Decode every medium of a folder's training shards; returns the number of samples."""
    count = 0
    shards = sorted(map(str, folder.glob("train-*.tar")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        count += 1
        for name, data in sample.items():
            kind = name.rpartition(".")[2]
            if kind in SOUND:
                _sound(data)
            elif kind in IMAGE:
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            elif kind in VIDEO:
                _video(data, sound)
    return count


def _sound(data: bytes) -> None:
    soundfile.read(io.BytesIO(data), dtype="float32")


def _video(data: bytes, sound: bool) -> None:
    with av.open(io.BytesIO(data)) as container:
        pictures = container.streams.video[0]
        pictures.thread_type = "NONE"
        for frame in container.decode(pictures, *container.streams.audio[: int(sound)]):
            if isinstance(frame, av.VideoFrame):
                frame.to_ndarray(format="rgb24", threads=1)
            else:
                frame.to_ndarray()


def recipe(root: Path) -> Recipe:
    """Recipe of the rehearsal's mix in long rows, loaded in the calling process."""
    found = load_recipe(["stage=s2_general", "model=tiny", "data=rehearsal_omni", f"data.path={root}"])
    changes = {"row_tokens": ROW_TOKENS, "alignment": ALIGNMENT, "streams": 1, "workers": 0}
    found.data = replace(found.data, **changes)
    return found


def ours(whole: Recipe, folder: Path, samples: int) -> float:
    """Seconds per sample of a loader of one folder alone, over ``samples`` samples."""
    # A row is made of little more than its own sequences, so that those of the rows are all that were decoded.
    data = replace(whole.data, sources=[SourceConfig(str(folder))], packing_buffer=1)
    rows = iter(build_loader(data, whole.model, seed=1))
    next(rows)  # fills the shuffle buffer, once in a run
    start, done = time.perf_counter(), 0
    for row in rows:
        done += row.samples
        if done >= samples:
            return (time.perf_counter() - start) / done
    raise AssertionError("a loader never ends")


def compare(whole: Recipe, folder: Path, *, sound: bool) -> tuple[int, tuple[float, float]]:
    """Number of samples of a folder, and seconds per sample of the bare loop and the loader."""
    start = time.perf_counter()
    samples = bare(folder, sound=sound)
    theirs = (time.perf_counter() - start) / samples
    return samples, (theirs, ours(whole, folder, samples))


def report(kind: str, theirs: float, mine: float) -> list[dict]:
    return [
        {"name": f"loader, {kind}, bare decoding", "value": 1 / theirs, "unit": "samples/s"},
        {"name": f"loader, {kind}, omni_train", "value": 1 / mine, "unit": "samples/s"},
        {"name": f"loader, {kind}, ratio", "value": theirs / mine, "unit": "×"},
    ]


def mix(whole: Recipe) -> tuple[float, float, float]:
    """Samples and tokens a second of the whole mix, and the fraction of the rows' tokens that are real."""
    rows = iter(build_loader(whole.data, whole.model, seed=1))
    next(rows)  # fills the packing buffer
    start = time.perf_counter()
    made = list(itertools.islice(rows, ROWS))
    seconds = time.perf_counter() - start
    real = sum(int((~row.padding).sum()) for row in made)
    return sum(row.samples for row in made) / seconds, real / seconds, real / (ROWS * ROW_TOKENS)


def run() -> list[dict]:
    """Rows of name, value and unit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader worker
    try:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "rehearsal"
            build(root, samples=SHARE)
            whole = recipe(root)
            rows, totals = [], np.zeros(2)
            for kind in KINDS:
                samples, seconds = compare(whole, root / kind, sound=kind != "video")
                totals += samples * np.array(seconds)
                rows += report(kind, *seconds)
            rows.append(
                {"name": "loader, all of the rehearsal's media, ratio", "value": totals[0] / totals[1], "unit": "×"}
            )
            for folder in media.build(root, Path(scratch) / "media"):
                _, seconds = compare(whole, folder, sound=True)
                rows += report(folder.name, *seconds)
            samples_per_second, tokens_per_second, real = mix(whole)
    finally:
        torch.set_num_threads(threads)
    name = f"loader, rehearsal_omni in rows of {ROW_TOKENS:,}, one worker"
    return [
        *rows,
        {"name": name, "value": samples_per_second, "unit": "samples/s"},
        {"name": name, "value": tokens_per_second, "unit": "tokens/s"},
        {"name": f"{name}, real tokens", "value": 100 * real, "unit": "%"},
    ]
