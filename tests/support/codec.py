"""A codec small enough to train in a test: frames of 120 samples, five milliseconds of 24 kHz."""

from __future__ import annotations

import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.recipe.schema import Code2WavConfig, CodecConfig, CodecTrainingConfig, DiscriminatorConfig, ModelConfig

FRAME = 120
CODEC = CodecConfig(
    num_filters=4,
    upsampling_ratios=[5, 4, 3],
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    sliding_window=10,
    num_quantizers=4,
    codebook_size=14,
    codebook_dim=6,
)
CODE2WAV = Code2WavConfig(
    codebook_size=14,
    num_quantizers=4,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=20,
    sliding_window=5,
    upsampling_ratios=[2],
    upsample_rates=[5, 4, 3],
    decoder_dim=32,
)
MODEL = ModelConfig(name="speaks", codec=CODEC, code2wav=CODE2WAV)
TRAINING = CodecTrainingConfig(
    mel_windows=[64, 256],
    mel_bins=[6, 20],
    quantized_fraction=1.0,
    quantizer_dropout=0.0,
    discriminators=DiscriminatorConfig(stft_windows=[128, 64], stft_channels=3, periods=[3, 5], period_channels=[3, 5]),
)


def voice(samples: int, seed: int, hertz: float = 150.0) -> torch.Tensor:
    """Something like a vowel (samples,): harmonics of a wavering pitch, in syllables, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(samples) / 24000
    phase = 2 * torch.pi * (hertz * t + 3 * torch.sin(2 * torch.pi * 1.7 * t + seed))
    harmonics = sum(torch.sin(k * phase) / k for k in range(1, 12))
    syllables = 0.55 + 0.45 * torch.sin(2 * torch.pi * 4 * t + seed)
    return 0.1 * harmonics * syllables + 0.003 * torch.randn(samples, generator=generator)


def wave_row(crops: int = 3, frames: int = 9, seed: int = 0, lengths: list[int] | None = None) -> WaveRow:
    """A row of crops, the second one shorter than the others where nothing else is said."""
    samples = frames * FRAME
    lengths = lengths or [samples if crop != 1 else samples - 3 * FRAME - 41 for crop in range(crops)]
    waveform = torch.stack([voice(samples, seed + crop, 120 + 31 * crop) for crop in range(crops)])
    waveform *= torch.arange(samples) < torch.tensor(lengths)[:, None]
    draws = torch.arange(crops) + 17 * seed
    return WaveRow(waveform, torch.tensor(lengths), draws, samples=crops)
