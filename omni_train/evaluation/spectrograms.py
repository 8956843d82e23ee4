"""Mel spectrograms of waveforms, drawn side by side as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from omni_train.objectives.spectral import mel_magnitudes

WINDOW, BINS = 1024, 80
DECIBELS = (-100.0, -20.0)  # of full scale: shown from black to white


def draw_spectrograms(waveforms: Mapping[str, np.ndarray], sampling_rate: int, path: Path) -> None:
    """Draw the mel spectrograms of waveforms side by side, under their names.

    Args:
        waveforms: name -> waveform (n,) float32, in order.
        sampling_rate: in Hz.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(waveforms), figsize=(5 * len(waveforms), 3), sharey=True, squeeze=False)
    for axes, (name, waveform) in zip(panels[0], waveforms.items(), strict=True):
        magnitude_FM = mel_magnitudes(torch.from_numpy(waveform)[None], WINDOW, BINS, sampling_rate)[0]
        decibels_MF = 20 * magnitude_FM.clamp_min(1e-9).log10().T
        seconds = len(waveform) / sampling_rate
        axes.imshow(
            decibels_MF.numpy(),
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, BINS),
            vmin=DECIBELS[0],
            vmax=DECIBELS[1],
            cmap="magma",
        )
        axes.set(title=name, xlabel="seconds")
    panels[0][0].set_ylabel("mel bin")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
