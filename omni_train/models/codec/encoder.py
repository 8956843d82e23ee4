"""Encoder of the codec, which is Mimi's: waveforms to latents at the rate of the codes.

SEANet convolutions (Zeghidour et al. 2021), a causal Transformer, and a stride-2 convolution (Défossez et al. 2024,
"Moshi", section 3.3.1). Causal throughout, and the same whole as in a stream.

Axis letters: B batch, S samples, C channels, T time steps, H hidden.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.nn.causal_transformer import CausalTransformer
from omni_train.nn.waveform import RESIDUAL_GAIN, CausalConv1d, StreamingState, variance_preserving_init
from omni_train.recipe.schema import CodecConfig

LATENT_STRIDE = 2
"""Steps of the Transformer in one frame of codes."""
INPUT_GAIN = 10.0
"""Initial scale of the first convolution: on speech of a tenth of full scale and less, ELU is a straight line."""


class CodecEncoder(torch.nn.Module):
    """Mimi's encoder: 24 kHz waveforms to latents.

    Args:
        config: sizes of the codec.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        channels = config.num_filters
        self.first = CausalConv1d(1, channels, config.kernel_size)
        self.stages = torch.nn.ModuleList()
        for stride in reversed(config.upsampling_ratios):
            self.stages.append(DownStage(config, channels, stride))
            channels *= 2
        self.last = CausalConv1d(channels, config.hidden_size, config.last_kernel_size)
        self.transformer = CausalTransformer(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            window=config.sliding_window,
            rope_theta=config.rope_theta,
            layer_scale=config.layer_scale_initial_scale,
            eps=config.norm_eps,
            gated=False,
        )
        self.downsample = CausalConv1d(
            config.hidden_size,
            config.hidden_size,
            2 * LATENT_STRIDE,
            stride=LATENT_STRIDE,
            bias=False,
            replicate=True,
        )
        variance_preserving_init(self)
        with torch.no_grad():
            self.first.weight.mul_(INPUT_GAIN)
            for stage in self.stages:
                for unit in stage.units:
                    unit.widen.weight.mul_(RESIDUAL_GAIN)

    def forward(self, waveform: Tensor, state: StreamingState | None = None) -> Tensor:
        """Latents of a waveform.

        Args:
            waveform: (B, S) at 24 kHz.
            state: streaming state, where the signal comes in pieces; all but the last are whole frames long.

        Returns:
            (B, T, H) with T = ceil(S / samples of a frame).
        """
        x = self.first(waveform.unsqueeze(1), state)
        for stage in self.stages:
            x = stage(x, state)
        x = self.last(F.elu(x, inplace=True), state)
        x = self.transformer(x.transpose(1, 2), state)
        return self.downsample(x.transpose(1, 2), state).transpose(1, 2)


class DownStage(torch.nn.Module):
    """Downsampling stage: residual units, then a strided convolution that doubles the channels.

    Args:
        config: sizes of the codec.
        channels: C of the input.
        stride: input steps of each output step.
    """

    def __init__(self, config: CodecConfig, channels: int, stride: int) -> None:
        super().__init__()
        self.units = torch.nn.ModuleList(
            ResidualUnit(config, channels, config.dilation_growth_rate**unit)
            for unit in range(config.num_residual_layers)
        )
        self.down = CausalConv1d(channels, 2 * channels, 2 * stride, stride=stride)

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Downsample, (B, C, T) -> (B, 2·C, ceil(T / stride))."""
        for unit in self.units:
            x = unit(x, state)
        return self.down(F.elu(x, inplace=True), state)


class ResidualUnit(torch.nn.Module):
    """Residual unit: a dilated convolution to fewer channels and a pointwise one back, an ELU before each.

    Args:
        config: sizes of the codec.
        channels: C.
        dilation: of the first convolution.
    """

    def __init__(self, config: CodecConfig, channels: int, dilation: int) -> None:
        super().__init__()
        narrow = channels // config.compress
        self.narrow = CausalConv1d(channels, narrow, config.residual_kernel_size, dilation=dilation)
        self.widen = CausalConv1d(narrow, channels, 1)

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Output of the unit, (B, C, T) -> (B, C, T)."""
        return x + self.widen(F.elu(self.narrow(F.elu(x), state), inplace=True), state)


def frame_samples(config: CodecConfig) -> int:
    """Samples of one frame of codes: 1920 in Mimi, which is 80 ms at 24 kHz."""
    return LATENT_STRIDE * math.prod(config.upsampling_ratios)
