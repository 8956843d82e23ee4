"""The vision encoder: each frame by itself, in any company, recomputed or not."""

from __future__ import annotations

import pytest
import torch

from omni_train.recipe.schema import ParallelConfig, VisionEncoderConfig
from tests.support.encoders import randomized, thinker_config

VISION = VisionEncoderConfig(
    hidden_size=24,
    depth=2,
    num_heads=3,
    intermediate_size=22,
    patch_size=2,
    num_position_embeddings=25,
    deepstack_visual_indexes=[0],
)
GRIDS = [(3, 4, 6), (1, 2, 2), (1, 6, 4), (2, 4, 6), (1, 10, 2)]


def random_patches(grids, seed=5):
    count = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3 * 2 * 2 * 2), dtype=torch.uint8, generator=generator)


def build(**options):
    from omni_train import platform
    from omni_train.models.vision_encoder import VisionEncoder

    platform.setup()
    platform.parallel.initialize(ParallelConfig(), 3)
    torch.manual_seed(4)
    return randomized(VisionEncoder(VISION, thinker_config(**options)))


def encode(rank, world_size, rows):
    """Last and kept features for rows of (patches, grids)."""
    from omni_train import platform

    encoder = build()
    with torch.no_grad():
        outputs = [torch.stack([out, *kept]) for out, kept in (encoder(x, torch.tensor(grids)) for x, grids in rows)]
    platform.parallel.destroy()
    return outputs


def test_an_image_is_encoded_alone_as_among_others(distributed):
    patches = random_patches(GRIDS)
    alone = [(part, [grid]) for part, grid in zip(patches.split([t * h * w for t, h, w in GRIDS]), GRIDS, strict=True)]
    (together, *parts), *_ = distributed(1, encode, [(patches, GRIDS), *alone])
    torch.testing.assert_close(together, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_a_change_reaches_its_frame_and_nothing_else(distributed):
    patches = random_patches(GRIDS)
    other = patches.clone()
    other[24 + 5] = 255 - other[24 + 5]  # in the second frame of the first video
    ((before, after),) = distributed(1, encode, [(patches, GRIDS), (other, GRIDS)])
    different = (before != after).any(-1).all(0).nonzero().squeeze(1)
    assert different.tolist() == list(range(24, 48))


def train(rank, world_size, options, frozen):
    from omni_train import platform

    encoder = build(**options).train()
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    out, (kept,) = encoder(random_patches(GRIDS), torch.tensor(GRIDS))
    ((out + kept.square()) * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if not name.startswith(frozen)}
    platform.parallel.destroy()
    return out.detach(), gradients


@pytest.mark.parametrize("frozen", [("nothing",), ("patch", "position", "layers.0.")])
def test_recomputation_changes_nothing_behind_frozen_layers_too(distributed, frozen):
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    expected, have = (distributed(1, train, options, frozen)[0] for options in ({}, full))
    torch.testing.assert_close(have, expected)
    assert expected[1] and all(gradient.abs().sum() > 0 for gradient in expected[1].values())
