"""Sounds that an evaluation keeps: WAVs to listen to, and their spectrograms beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile

from omni_train.evaluation.spectrograms import draw_spectrograms

SHORTEST = 0.2  # seconds that a spectrogram shows


def keep_sounds(
    directory: Path, stem: str, waveforms: Mapping[str, np.ndarray], sampling_rate: int, suffix: str = ""
) -> dict[str, Path]:
    """Write waveforms as ``STEM_NAMESUFFIX.wav``, and ``STEM_spectrogramsSUFFIX.png`` of all.

    Args:
        directory: made where it is missing.
        stem: what the files' names begin with.
        waveforms: name -> waveform (n,) float32, in order.
        sampling_rate: in Hz.
        suffix: what the names end with.

    Returns:
        the file of each name, and of ``spectrograms``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: directory / f"{stem}_{name}{suffix}.wav" for name in waveforms}
    for name, waveform in waveforms.items():
        soundfile.write(files[name], waveform, sampling_rate, subtype="PCM_16")
    files["spectrograms"] = directory / f"{stem}_spectrograms{suffix}.png"
    shortest = round(SHORTEST * sampling_rate)
    shown = {name: np.pad(one, (0, max(0, shortest - len(one)))) for name, one in waveforms.items()}
    draw_spectrograms(shown, sampling_rate, files["spectrograms"])
    return files
