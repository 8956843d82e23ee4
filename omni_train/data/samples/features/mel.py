"""Log-mel frames as in Whisper (Radford et al. 2022). Axis letters: F frames, M mel bins."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

SAMPLE_RATE = 16000  # Hz
WINDOW = 400  # samples: 25 ms
HOP = 160  # samples: 10 ms
CHUNK_FRAMES = 512  # frames whose spectrum exists at once: as much as a core's own cache holds


def log_mel(waveform: np.ndarray, bins: int = 128) -> np.ndarray:
    """Log-mel spectrogram (F, M) float32 of a waveform (n,) float32 of 16 kHz, F = n // 160.

    Equals ``transformers``' ``WhisperFeatureExtractor(feature_size=bins)`` given the clip alone without truncation and
    with ``padding="longest"``, as Qwen3-Omni's processor calls it. (In a batch the extractor pads shorter clips with
    silence, which changes their last frame and nothing else that its mask keeps.) A waveform of any length takes the
    memory of its frames and of one chunk.
    """
    frames = len(waveform) // HOP
    log_mel_FM = torch.empty(frames, bins)
    window, filters = _window(), mel_filters(bins, WINDOW, SAMPLE_RATE)
    for first in range(0, frames, CHUNK_FRAMES):
        last = min(first + CHUNK_FRAMES, frames)
        # A frame is centred on its first sample: it begins half a window before, mirrored at both ends of the clip.
        begin, end = first * HOP - WINDOW // 2, (last - 1) * HOP + WINDOW // 2
        samples = waveform[max(begin, 0) : end]
        if begin < 0 or end > len(waveform):
            before, after = np.arange(begin, 0), np.arange(len(waveform), end)
            samples = np.concatenate([_mirrored(waveform, before), samples, _mirrored(waveform, after)])
        windows = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)).unfold(0, WINDOW, HOP) * window
        spectrum = torch.fft.rfft(windows)
        power = spectrum.real.square() + spectrum.imag.square()  # the square of abs() takes five times as long
        torch.mm(power, filters, out=log_mel_FM[first:last])
    log_mel_FM.clamp_(min=1e-10).log10_()
    if frames:
        log_mel_FM.clamp_(min=float(log_mel_FM.max()) - 8).add_(4).div_(4)
    return log_mel_FM.numpy()


def log_mel_with_gradient(waveform: torch.Tensor, bins: int = 128) -> torch.Tensor:
    """The same as :func:`log_mel`, (F, M) of a waveform (n,) on any device, with a gradient; n is at least 201."""
    window = torch.hann_window(WINDOW, device=waveform.device)
    spectrum_KF = torch.stft(waveform.float(), WINDOW, HOP, window=window, return_complex=True)
    power_KF = spectrum_KF.real.square() + spectrum_KF.imag.square()
    power_FM = power_KF[:, : len(waveform) // HOP].T @ mel_filters(bins, WINDOW, SAMPLE_RATE).to(waveform.device)
    log_mel_FM = power_FM.clamp(min=1e-10).log10()
    return (log_mel_FM.clamp(min=log_mel_FM.detach().max() - 8) + 4) / 4


def _mirrored(waveform: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Samples of the mirrored waveform at any indices; ``numpy.pad`` would take as long as a second's spectrum."""
    period = max(2 * (len(waveform) - 1), 1)
    indices = indices % period
    return waveform[np.minimum(indices, period - indices)]


@cache
def _window() -> torch.Tensor:
    return torch.hann_window(WINDOW)


@cache
def mel_filters(bins: int, window: int, sampling_rate: int) -> torch.Tensor:
    """Triangular mel filters (window/2+1, M) from 0 to half the sampling rate in Hz, each of unit area.

    On the scale of Slaney's Auditory Toolbox (1998): linear below 1 kHz, 15 mel a kHz, and 27 mel for each factor of
    6.4 above.
    """
    mel = np.linspace(0.0, 15.0 + 27.0 * np.log(sampling_rate / 2 / 1000.0) / np.log(6.4), bins + 2)
    hertz = np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * 6.4 ** ((mel - 15.0) / 27.0))
    lower, centre, upper = hertz[:-2], hertz[1:-1], hertz[2:]
    frequencies = np.linspace(0.0, sampling_rate / 2, window // 2 + 1)[:, None]
    rising, falling = (frequencies - lower) / (centre - lower), (upper - frequencies) / (upper - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (upper - lower)
    return torch.from_numpy(triangles.astype(np.float32))
