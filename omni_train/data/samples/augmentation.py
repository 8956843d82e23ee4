"""Augmentation of clips: another speed, noise, and masks over the spectrogram.

Axis letters: F mel frames, M mel bins.
"""

from __future__ import annotations

import hashlib

import numpy as np
import soxr

from omni_train.data.samples.features.mel import HOP, SAMPLE_RATE
from omni_train.recipe.schema import AugmentationConfig

MOST_COLOURED = 2.0  # noise of power 1/f^2, brown; 0 is white


class Augmentation:
    """Augmentation of one clip, drawn from a seed and a key of the sample.

    Args:
        config: settings of the recipe.
        seed: seed of the run.
        key: key of the sample and the epoch; anything whose ``repr`` identifies it.
    """

    def __init__(self, config: AugmentationConfig, seed: int, key: object) -> None:
        self.config = config
        digest = hashlib.blake2b(f"{seed} {key!r}".encode(), digest_size=8).digest()
        self.generator = np.random.default_rng(int.from_bytes(digest))

    @property
    def fastest(self) -> float:
        """Highest speed at which clips are played, 1 being their own."""
        return max([1.0, *self.config.speeds])

    def waveform(self, waveform: np.ndarray) -> np.ndarray:
        """Waveform (n,) float32 at 16 kHz, at a drawn speed, with noise where it is drawn to have some."""
        config, draw = self.config, self.generator
        if config.speeds:
            waveform = _at_speed(waveform, float(draw.choice(config.speeds)))
        if draw.random() < config.noise_probability:
            waveform = _noisy(waveform, draw.uniform(*config.noise_snr_db), draw.uniform(0, MOST_COLOURED), draw)
        return waveform

    def mel(self, mel_FM: np.ndarray) -> np.ndarray:
        """Log-mel frames with SpecAugment's masks (Park et al. 2019, section 2): stripes of the clip's mean value.

        A mask's width is drawn from 0 to its greatest, its place from those where it lies inside. In time the greatest
        is the smaller of ``time_mask_frames`` and a fraction of the clip: short clips keep most of what is said.
        """
        config, (frames, bins) = self.config, mel_FM.shape
        longest = min(config.time_mask_frames, int(config.time_mask_fraction * frames))
        mel_FM, hidden = mel_FM.copy(), mel_FM.mean()
        for _ in range(config.frequency_masks):
            mel_FM[:, self._stripe(min(config.frequency_mask_bins, bins), bins)] = hidden
        for _ in range(config.time_masks):
            mel_FM[self._stripe(longest, frames)] = hidden
        return mel_FM

    def _stripe(self, widest: int, size: int) -> slice:
        width = int(self.generator.integers(0, widest, endpoint=True))
        start = int(self.generator.integers(0, size - width, endpoint=True))
        return slice(start, start + width)


def _at_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """Waveform played ``speed`` times as fast, pitch and all (Ko et al. 2015); unchanged if no frame would remain."""
    if speed == 1.0 or len(waveform) / speed < HOP + 1:
        return waveform
    return soxr.resample(waveform, SAMPLE_RATE * speed, SAMPLE_RATE)


def _noisy(waveform: np.ndarray, snr_db: float, colour: float, generator: np.random.Generator) -> np.ndarray:
    """Waveform with Gaussian noise of power 1/f^``colour``, ``snr_db`` below the clip's mean power."""
    spectrum = np.fft.rfft(generator.standard_normal(len(waveform)))
    spectrum *= np.arange(1, len(spectrum) + 1) ** (-colour / 2)
    noise = np.fft.irfft(spectrum, len(waveform))
    power = np.mean(np.square(waveform, dtype=np.float64)) * 10 ** (-snr_db / 10)
    return (waveform + noise * np.sqrt(power / np.mean(np.square(noise)))).astype(np.float32)
