"""Code2Wav of the released Qwen3-Omni: codes to a waveform, causally, whole or as a stream.

A causal Transformer with a sliding window at the rate of the codes, ConvNeXt upsampling (Liu et al. 2022) to four times
the rate, and transposed convolutions with residual units of SnakeBeta up to 24 kHz.

Axis letters: B batch, N codebooks, T frames of codes, H hidden, C channels, S samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.nn.causal_transformer import CausalTransformer
from omni_train.nn.waveform import (
    RESIDUAL_GAIN,
    CausalConv1d,
    CausalTransposedConv1d,
    SnakeBeta,
    StreamingState,
    variance_preserving_init,
)
from omni_train.recipe.schema import Code2WavConfig

DILATIONS = (1, 3, 9)
OUTPUT_GAIN = 0.01
"""Initial scale of the last convolution: speech is far from full scale, and too loud costs more than too soft."""


class Code2Wav(torch.nn.Module):
    """Code2Wav: vocoder from codes to a 24 kHz waveform.

    Args:
        config: sizes of the network.
    """

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = CodeEmbedding(config)
        self.decoder = WaveDecoder(config)

    def forward(self, codes: Tensor, state: StreamingState | None = None, clamp: bool = True) -> Tensor:
        """Waveform of codes.

        Args:
            codes: (B, n, T) int64 of the first n of the N codebooks; n = N where it was trained on all.
            state: streaming state, where the codes come in pieces of any lengths.
            clamp: whether to clamp samples to −1 … 1; False for training, as clamped samples have no gradient.

        Returns:
            (B, S) samples at 24 kHz, S = :func:`wave_samples` of T.
        """
        waveform = self.decoder(self.embedding(codes), state)
        return waveform.clamp(-1, 1) if clamp else waveform

    def chunked_decode(self, codes: Tensor, chunk_size: int = 300, left_context_size: int = 25) -> Tensor:
        """Waveform of codes decoded in independent chunks with left context, as transformers decodes them.

        Every chunk is as much shorter than its frames as :func:`wave_samples` says. For chunks that add up to what
        decoding the whole gives, pass a `state` to :meth:`forward` instead.

        Args:
            codes: (B, N, T) int64.
            chunk_size: frames of a chunk.
            left_context_size: frames of context before it.

        Returns:
            (B, S) at 24 kHz.
        """
        frame = frame_samples(self.config)
        pieces = []
        for start in range(0, codes.shape[-1], chunk_size):
            # A context that would reach the very first frame takes all there is before the piece.
            context = left_context_size if start > left_context_size else start
            piece = self(codes[..., start - context : start + chunk_size])
            pieces.append(piece[..., context * frame :])
        return torch.cat(pieces, dim=-1)


class CodeEmbedding(torch.nn.Module):
    """Mean of the embeddings of a frame's codes, one table for all codebooks.

    Args:
        config: sizes of Code2Wav.
    """

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.num_quantizers, self.codebook_size = config.num_quantizers, config.codebook_size
        self.weight = torch.nn.Parameter(torch.randn(config.num_quantizers * config.codebook_size, config.hidden_size))

    def forward(self, codes: Tensor) -> Tensor:
        """Sum of the codes' embeddings, divided by N: (B, n, T) codes of the first n codebooks -> (B, T, H)."""
        offsets = torch.arange(codes.shape[1], device=codes.device) * self.codebook_size
        embedded = F.embedding(codes + offsets[:, None], self.weight)
        return embedded.sum(1) / self.num_quantizers


class WaveDecoder(torch.nn.Module):
    """Code2Wav without its embedding, which is also the codec's decoder: latent frames to a waveform.

    Args:
        config: sizes of Code2Wav.
    """

    def __init__(self, config: Code2WavConfig) -> None:
        super().__init__()
        self.transformer = CausalTransformer(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            window=config.sliding_window,
            rope_theta=config.rope_theta,
            layer_scale=config.layer_scale_initial_scale,
            eps=config.rms_norm_eps,
            gated=True,
        )
        self.upsample = torch.nn.ModuleList(
            ConvNeXtStage(config.hidden_size, factor) for factor in config.upsampling_ratios
        )
        channels = config.decoder_dim
        self.first = CausalConv1d(config.hidden_size, channels, 7)
        self.stages = torch.nn.ModuleList()
        for rate in config.upsample_rates:
            self.stages.append(UpStage(channels, rate))
            channels //= 2
        self.last_activation = SnakeBeta(channels)
        self.last = CausalConv1d(channels, 1, 7)
        variance_preserving_init(self)
        with torch.no_grad():
            self.last.weight.mul_(OUTPUT_GAIN)
            for stage in self.stages:
                for unit in stage.units:
                    unit.point.weight.mul_(RESIDUAL_GAIN)

    def forward(self, hidden: Tensor, state: StreamingState | None = None) -> Tensor:
        """Waveform of latent frames, (B, T, H) -> (B, S), not clamped."""
        x = self.transformer(hidden, state).transpose(1, 2)
        for stage in self.upsample:
            x = stage(x, state)
        x = self.first(x, state)
        for stage in self.stages:
            x = stage(x, state)
        return self.last(self.last_activation(x), state).squeeze(1)


class ConvNeXtStage(torch.nn.Module):
    """Upsampling stage: a transposed convolution, and a ConvNeXt block at the new rate.

    Args:
        channels: H.
        factor: output steps of each input step.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.up = CausalTransposedConv1d(channels, channels, factor, factor)
        self.block = ConvNeXtBlock(channels)

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Upsample, (B, H, T) -> (B, H, factor·T)."""
        return self.block(self.up(x), state)


class ConvNeXtBlock(torch.nn.Module):
    """ConvNeXt block (Liu et al. 2022, section 2.5): depthwise convolution, LayerNorm, MLP and LayerScale, residual.

    Args:
        channels: H.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = CausalConv1d(channels, channels, 7, groups=channels)
        self.norm = torch.nn.LayerNorm(channels, eps=1e-6)
        self.up = torch.nn.Linear(channels, 4 * channels)
        self.down = torch.nn.Linear(4 * channels, channels)
        self.gamma = torch.nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Output of the block, (B, H, T) -> (B, H, T)."""
        y = self.norm(self.depthwise(x, state).transpose(1, 2))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.transpose(1, 2)


class UpStage(torch.nn.Module):
    """Upsampling stage: a transposed convolution to half the channels, then residual units of rising dilation.

    Args:
        channels: C of the input.
        rate: output steps of each input step.
    """

    def __init__(self, channels: int, rate: int) -> None:
        super().__init__()
        self.activation = SnakeBeta(channels)
        self.up = CausalTransposedConv1d(channels, channels // 2, 2 * rate, rate)
        self.units = torch.nn.ModuleList(SnakeUnit(channels // 2, dilation) for dilation in DILATIONS)

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Upsample, (B, C, T) -> (B, C/2, rate·(T − 1))."""
        x = self.up(self.activation(x), state)
        for unit in self.units:
            x = unit(x, state)
        return x


class SnakeUnit(torch.nn.Module):
    """Residual unit: a dilated convolution and a pointwise one, a SnakeBeta before each.

    Args:
        channels: C.
        dilation: of the first convolution.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.wide_activation = SnakeBeta(channels)
        self.wide = CausalConv1d(channels, channels, 7, dilation=dilation)
        self.point_activation = SnakeBeta(channels)
        self.point = CausalConv1d(channels, channels, 1)

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Output of the unit, (B, C, T) -> (B, C, T)."""
        y = self.wide(self.wide_activation(x), state)
        return x + self.point(self.point_activation(y), state)


def frame_samples(config: Code2WavConfig) -> int:
    """Samples of one frame of codes: 1920 in Qwen3-Omni, which is 80 ms at 24 kHz."""
    return wave_samples(config, 2) - wave_samples(config, 1)


def wave_samples(config: Code2WavConfig, frames: int) -> int:
    """Samples of the waveform of `frames` frames of codes: in Qwen3-Omni 1920 each, less 555 in all.

    Each transposed convolution loses a step at the end of the signal (see :class:`CausalTransposedConv1d`). The first
    sample is the beginning of the first frame, so the decoder looks 23 ms ahead of each sample.
    """
    for factor in config.upsampling_ratios:
        frames *= factor
    for rate in config.upsample_rates:
        frames = rate * (frames - 1)
    return frames
