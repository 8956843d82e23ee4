"""AuT: its rate, its windows, and that a clip is encoded alike alone, among others, in small batches and recomputed."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import pytest
import torch

from omni_train.recipe.schema import AudioEncoderConfig, ParallelConfig
from tests.support.encoders import randomized, thinker_config

AUT = AudioEncoderConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    num_mel_bins=20,
    conv_channels=5,
)


def boundaries(clips):
    return torch.tensor([0, *accumulate(clips)], dtype=torch.int32)


def random_mel(clips, config=AUT):
    return torch.randn(sum(clips), config.num_mel_bins, generator=torch.Generator().manual_seed(sum(clips)))


def build(config=AUT, **options):
    """A random encoder, the same in every call."""
    from omni_train import platform
    from omni_train.models.audio_encoder import AudioEncoder

    platform.setup()
    platform.parallel.initialize(ParallelConfig(), 3)
    torch.manual_seed(4)
    return randomized(AudioEncoder(config, thinker_config(**options)))


def encode(rank, world_size, config, rows, frames_at_once=None):
    """Outputs for rows of (mel, clips, window)."""
    from omni_train import platform
    from omni_train.models import audio_encoder

    before = audio_encoder.CONVOLVED_FRAMES
    audio_encoder.CONVOLVED_FRAMES = frames_at_once or before
    encoder = build(config=config)
    with torch.no_grad():
        outputs = [encoder(mel, boundaries(clips), window) for mel, clips, window in rows]
    audio_encoder.CONVOLVED_FRAMES = before
    platform.parallel.destroy()
    return outputs


def encoded(distributed, rows, config=AUT, **options):
    return distributed(1, encode, config, rows, *options.values())[0]


@pytest.mark.parametrize("chunk_frames", [400, 800])
def test_sixteen_frames_become_one_token_whatever_the_length(distributed, chunk_frames):
    lengths = [1, 15, 16, 17, 399, 400, 401, 799, 800, 801, 1603]
    config = dataclasses.replace(AUT, chunk_frames=chunk_frames)
    rows = [(random_mel([length]), [length], 800) for length in lengths]
    assert [len(out) for out in encoded(distributed, rows, config)] == [-(-length // 16) for length in lengths]


@pytest.mark.parametrize("window", [0, 100, 800])
def test_a_clip_is_encoded_alone_as_among_others_and_in_batches_of_any_size(distributed, window):
    clips = [37, 1700, 16, 801, 333]
    mel = random_mel(clips)
    alone = [(part, [len(part)], window) for part in mel.split(clips)]
    together, *parts = encoded(distributed, [(mel, clips, window), *alone])
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-5)
    (one_by_one,) = encoded(distributed, [(mel, clips, window)], frames_at_once=1)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "reached"),
    [(0, range(125)), (800, range(50, 100)), (320, range(80, 100)), (160, range(80, 90)), (16, [86])],
)
def test_a_change_reaches_its_window_and_nothing_else(distributed, window, reached):
    clips, changed = [500, 2000], 500 + 86 * 16  # a frame that the convolutions give to one token alone
    mel = random_mel(clips)
    other = mel.clone()
    other[changed] += 1.0
    before, after = encoded(distributed, [(mel, clips, window), (other, clips, window)])
    different = (before != after).any(1).nonzero().squeeze(1) - 32  # tokens of the second clip
    assert different.tolist() == list(reached)


def train(rank, world_size, options, frozen, clips, window):
    """Output and gradients of one backward pass."""
    from omni_train import platform

    encoder = build(**options).train()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    out = encoder(random_mel(clips), boundaries(clips), window)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if not name.startswith(frozen)}
    platform.parallel.destroy()
    return out.detach(), gradients


FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@pytest.mark.parametrize("frozen", [("nothing",), ("conv", "layers.0.")])
def test_recomputation_changes_nothing_behind_frozen_layers_too(distributed, frozen):
    """A frozen part's output needs no gradient; what comes after it must learn all the same."""
    expected, have = (distributed(1, train, options, frozen, [900, 70], 320)[0] for options in ({}, FULL))
    torch.testing.assert_close(have, expected)
    assert expected[1] and all(gradient.abs().sum() > 0 for gradient in expected[1].values())
