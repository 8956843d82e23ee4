"""Media of the sizes that real data sets have, generated: the rehearsal's own are small.

Speech is cut from the rehearsal's long recordings. Pictures are coloured noise whose power falls with the square of
the frequency, as that of photographs does (Field, 1987), so that codecs work as hard on them.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import webdataset
from PIL import Image

from omni_train.data_pipelines.rehearsal.speech import RATE, flac
from omni_train.data_pipelines.rehearsal.world import attach, conversation
from omni_train.data_pipelines.shards import index_shards, write_shards

SAMPLES = 24  # of each kind
SPEECH_SECONDS, VIDEO_SECONDS, FPS = 20, 10, 30
PHOTOGRAPH, FRAME = (1024, 1024), (360, 640)  # height and width in pixels


def build(rehearsal: Path, out: Path) -> list[Path]:
    """Write a folder of training shards of each kind; returns the folders, named for what they hold."""
    waves = list(itertools.islice(_speech(rehearsal), SAMPLES))
    random = np.random.default_rng(1)
    kinds = {
        f"speech of {SPEECH_SECONDS} s": ("audio", "flac", map(flac, waves), {}),
        "photographs of 1 megapixel": ("image", "jpg", (_jpeg(_noise(random, *PHOTOGRAPH)) for _ in waves), {}),
        f"videos of {VIDEO_SECONDS} s, 360p, with sound": (
            "video",
            "mp4",
            (_mp4(random, wave) for wave in waves),
            {"sound": True},
        ),
    }
    for name, (kind, extension, files, fields) in kinds.items():
        samples = []
        for number, data in enumerate(files):
            media: dict[str, bytes] = {}
            part = attach(media, kind, extension, data, **fields)
            samples.append((f"{kind}-{number:03d}", conversation(([part, "What is it?"], "An example.")), media))
        write_shards(out / name, "train", samples, 1)
        index_shards(out / name)
    return [out / name for name in kinds]


def _speech(rehearsal: Path) -> Iterator[np.ndarray]:
    """Spans (n,) float32 of the long recordings, with the pauses between their sentences."""
    shards = sorted(map(str, (rehearsal / "long_audio").glob("train-*.tar")))
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        wave, _ = soundfile.read(io.BytesIO(sample["0.flac"]), dtype="float32")
        length = SPEECH_SECONDS * RATE
        yield from (wave[start : start + length] for start in range(0, len(wave) - length, length))


def _noise(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Image of coloured noise, (height, width, 3) uint8."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectrum = np.fft.rfft2(random.standard_normal((3, height, width))) / np.maximum(frequency, 1 / max(height, width))
    pixels = np.fft.irfft2(spectrum, (height, width))
    return np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _mp4(random: np.random.Generator, wave: np.ndarray) -> bytes:
    """MP4 file of a view that pans by two pixels a frame over a larger picture: H.264 with x264's defaults, and AAC."""
    height, width = FRAME
    scene = _noise(random, height, width + 2 * VIDEO_SECONDS * FPS)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", FPS, options={"threads": "1"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", RATE, layout="mono")
        for number in range(VIDEO_SECONDS * FPS):
            pixels = np.ascontiguousarray(scene[:, 2 * number : 2 * number + width])
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(video.encode())
        for start in range(0, VIDEO_SECONDS * RATE, 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], "fltp", "mono")
            frame.rate, frame.pts = RATE, start
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return file.getvalue()
