"""Discriminators of real and resynthesised speech, multi-scale STFT and multi-period.

Axis letters: B crops, S samples, C channels, T time, F frequencies, P samples of a period. In every feature map time is
the third axis.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from omni_train.recipe.schema import DiscriminatorConfig

DiscriminatorOutput = tuple[torch.Tensor, list[torch.Tensor]]
"""Logits (B, 1, T, F or P), high for real speech, and the feature maps (B, C, T, F or P) of the hidden layers."""


class NormedConv2d(torch.nn.Conv2d):
    """Convolution with weight normalisation (Salimans and Kingma 2016, section 2).

    Weight and gain are its own parameters, so that ZeRO 3 gathers both when its forward runs.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = torch.nn.Parameter(self.weight.detach().flatten(1).norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, (B, C, T, F) -> (B, C′, T′, F′)."""
        scale = self.gain / self.weight.flatten(1).norm(dim=1)
        weight = self.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Layers(torch.nn.Module):
    """Convolutions with leaky ReLU, whose outputs are the feature maps, and one that makes the logits."""

    def __init__(self, layers: list[NormedConv2d], head: NormedConv2d, slope: float) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.head = head
        self.slope = slope

    def forward(self, x: torch.Tensor) -> DiscriminatorOutput:
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), self.slope)
            features.append(x)
        return self.head(x), features


class STFTDiscriminator(torch.nn.Module):
    """STFT discriminator of one window length (EnCodec, Défossez et al. 2022, section 3.4 and figure 2).

    Args:
        window: samples of the STFT's window; a quarter of it is the hop.
        channels: C of the hidden layers.
    """

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.window = window
        layers = [NormedConv2d(2, channels, (3, 9), padding=(1, 4))]
        for dilation in (1, 2, 4):
            layers.append(
                NormedConv2d(channels, channels, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
            )
        layers.append(NormedConv2d(channels, channels, (3, 3), padding=1))
        self.net = _Layers(layers, NormedConv2d(channels, 1, (3, 3), padding=1), slope=0.2)

    def forward(self, waveform_BS: torch.Tensor) -> DiscriminatorOutput:
        """Logits and feature maps of crops of speech."""
        spectrum_BFT = torch.stft(
            waveform_BS.float(),  # there is no Fourier transform of bfloat16
            self.window,
            hop_length=self.window // 4,
            window=torch.hann_window(self.window, device=waveform_BS.device),
            normalized=True,
            return_complex=True,
        )
        x_B2TF = torch.view_as_real(spectrum_BFT).permute(0, 3, 2, 1)
        return self.net(x_B2TF.to(self.net.head.weight.dtype))


class PeriodDiscriminator(torch.nn.Module):
    """Discriminator of one period (HiFi-GAN, Kong et al. 2020, section 2.3).

    Args:
        period: P.
        channels: C of each hidden layer but the last, which has as many as the one before it.
    """

    def __init__(self, period: int, channels: list[int]) -> None:
        super().__init__()
        self.period = period
        layers = [
            NormedConv2d(before, after, (5, 1), stride=(3, 1), padding=(2, 0))
            for before, after in pairwise([1, *channels])
        ]
        layers.append(NormedConv2d(channels[-1], channels[-1], (5, 1), padding=(2, 0)))
        self.net = _Layers(layers, NormedConv2d(channels[-1], 1, (3, 1), padding=(1, 0)), slope=0.1)

    def forward(self, waveform_BS: torch.Tensor) -> DiscriminatorOutput:
        """Logits and feature maps of crops of speech."""
        rest = -waveform_BS.shape[1] % self.period
        padded_BS = F.pad(waveform_BS[:, None], (0, rest), "reflect") if rest else waveform_BS[:, None]
        x_B1TP = padded_BS.unflatten(2, (-1, self.period))
        return self.net(x_B1TP.to(self.net.head.weight.dtype))


class Discriminators(torch.nn.ModuleList):
    """All discriminators of a recipe, STFT first.

    Args:
        config: windows, periods and channels.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__(
            [
                *(STFTDiscriminator(window, config.stft_channels) for window in config.stft_windows),
                *(PeriodDiscriminator(period, config.period_channels) for period in config.periods),
            ]
        )

    def forward(self, waveform_BS: torch.Tensor) -> list[DiscriminatorOutput]:
        """Logits and feature maps of each discriminator on crops (B, S) of speech."""
        return [discriminator(waveform_BS) for discriminator in self]
