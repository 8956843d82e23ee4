"""Moving pictures: what happens when on a stage, drawn and encoded as MP4 with or without a sound track."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import av
import numpy as np

from omni_train.data_pipelines.rehearsal.pictures import Figure, paint
from omni_train.data_pipelines.rehearsal.speech import RATE


@dataclass(frozen=True)
class Film:
    """Figures by time, in seconds from 0 to ``duration``, before one background."""

    size: tuple[int, int]  # width and height in pixels, both even
    background: tuple[int, int, int]
    figures: Callable[[float], list[Figure]]
    duration: float
    fps: int

    def frames(self) -> list[np.ndarray]:
        """All frames, (height, width, 3) uint8; what does not change is drawn once."""
        drawn: list[np.ndarray] = []
        before = None
        for number in range(round(self.duration * self.fps)):
            figures = self.figures(number / self.fps)
            drawn.append(drawn[-1] if figures == before else np.asarray(paint(self.size, self.background, figures)))
            before = figures
        return drawn


def mp4(film: Film, codec: str, wave: np.ndarray | None = None) -> bytes:
    """Encode with ``codec`` (libx264 or mpeg4), and AAC for the sound track.

    The same film gives the same bytes: one thread for each stream, no date in the file, and none of x264's looking
    ahead, which on pictures of no whole number of blocks depends on what the memory held before.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        quality = {
            "libx264": {"crf": "18", "preset": "veryfast", "tune": "zerolatency"},
            "mpeg4": {"qscale": "3", "flags": "+qscale"},
        }[codec]
        video = container.add_stream(codec, film.fps, options=quality | {"threads": "1"})
        video.width, video.height = film.size
        video.pix_fmt = "yuv420p"
        video.gop_size = 4 * film.fps
        sound = None if wave is None else container.add_stream("aac", RATE, layout="mono")
        for pixels in film.frames():
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(video.encode())
        if sound is not None:
            for start in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], "fltp", "mono")
                frame.rate, frame.pts = RATE, start
                container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return file.getvalue()
