"""Spectral losses: distances of mel spectrograms at several resolutions.

Axis letters: B crops, S samples, F frames, M mel bins.
"""

from __future__ import annotations

import torch

from omni_train.data.samples.features.mel import mel_filters


class MelDistance:
    """Mean absolute distances of mel spectrograms over several windows (DAC, Kumar et al. 2023; EnCodec, section 3.4).

    The windows sum to one, so that a magnitude is an amplitude; a mel bin is the mean magnitude under its triangle;
    hops are a quarter of the window.

    Args:
        windows: length of each window in samples.
        bins: mel bins of each window.
        sampling_rate: of the waveforms, in Hz.
        floor: magnitude that is added before the logarithm, so that what is below hardly counts.
    """

    def __init__(self, windows: list[int], bins: list[int], sampling_rate: int, floor: float = 1e-5) -> None:
        self.windows, self.bins, self.sampling_rate, self.floor = windows, bins, sampling_rate, floor

    def __call__(
        self, one_BS: torch.Tensor, other_BS: torch.Tensor, lengths_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances (B,) of each crop: of the base-10 logarithms of mel magnitudes, and of the magnitudes.

        Args:
            one_BS: waveforms, compared as float32.
            other_BS: the waveforms to compare them with.
            lengths_B: samples of each crop; frames centred behind them do not count.
        """
        logarithmic, linear = [], []
        for window, bins in zip(self.windows, self.bins, strict=True):
            one_BFM = mel_magnitudes(one_BS.float(), window, bins, self.sampling_rate)
            other_BFM = mel_magnitudes(other_BS.float(), window, bins, self.sampling_rate)
            frames_F = torch.arange(one_BFM.shape[1], device=lengths_B.device) * (window // 4)
            weights_BF = (frames_F < lengths_B[:, None]).to(one_BFM.dtype)
            weights_BF = weights_BF / weights_BF.sum(1, keepdim=True)
            linear.append(((one_BFM - other_BFM).abs().mean(2) * weights_BF).sum(1))
            logs = ((magnitudes + self.floor).log10() for magnitudes in (one_BFM, other_BFM))
            logarithmic.append(((next(logs) - next(logs)).abs().mean(2) * weights_BF).sum(1))
        return torch.stack(logarithmic).mean(0), torch.stack(linear).mean(0)


def mel_magnitudes(waveform_BS: torch.Tensor, window: int, bins: int, sampling_rate: int) -> torch.Tensor:
    """Mel spectrogram (B, F, M) of magnitudes, F = S // (window / 4) + 1 frames centred on their first samples."""
    shape = torch.hann_window(window, device=waveform_BS.device)
    spectrum = torch.stft(waveform_BS, window, hop_length=window // 4, window=shape / shape.sum(), return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()
    magnitude_BFK = power.clamp_min(1e-20).sqrt().transpose(1, 2)  # the gradient of the root is infinite at zero
    filters_KM = mel_filters(bins, window, sampling_rate).to(waveform_BS.device)
    return magnitude_BFK @ (filters_KM / filters_KM.sum(0).clamp_min(1e-12))


def resampled(waveform_BS: torch.Tensor, sampling_rate: int, wanted: int) -> torch.Tensor:
    """Waveforms resampled by their spectrum: exact below half of the lower rate, but for wrapping at the ends.

    Args:
        waveform_BS: S must be a multiple of sampling_rate / gcd(sampling_rate, wanted).
        sampling_rate: of the waveforms, in Hz.
        wanted: sampling rate of the result, in Hz.
    """
    samples = waveform_BS.shape[1] * wanted // sampling_rate
    spectrum = torch.fft.rfft(waveform_BS.float())[:, : samples // 2 + 1]
    return torch.fft.irfft(spectrum, samples) * (samples / waveform_BS.shape[1])
