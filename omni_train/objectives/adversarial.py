"""The game of generator and discriminators on waveforms, crop by crop.

Axis letters: B crops, S samples, C channels, T time, X frequencies or samples of a period.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from omni_train.models.discriminators import DiscriminatorOutput
from omni_train.recipe.schema import AdversarialLoss, CodecTrainingConfig


@dataclass
class Game:
    """What each crop lost (B,), means over the discriminators, and where the generator should go."""

    generator: torch.Tensor
    features: torch.Tensor
    discriminators: torch.Tensor  # the only one with a gradient: of the discriminators
    right: torch.Tensor  # part of the logits that lie on the right side
    pull: (
        torch.Tensor
    )  # (B, S) gradient of the weighted sum of the first two over the crops, by the generator's waveform


def play(
    learn: Callable[[torch.Tensor], list[DiscriminatorOutput]],
    look: Callable[[torch.Tensor], list[DiscriminatorOutput]],
    fake_BS: torch.Tensor,
    real_BS: torch.Tensor,
    lengths_B: torch.Tensor,
    config: CodecTrainingConfig,
) -> Game:
    """Let the discriminators judge; what the generator learns of it leaves no gradient in them.

    Args:
        learn: the discriminators' forward, as the engine wraps it.
        look: the discriminators, unwrapped.
        fake_BS: of the generator.
        real_BS: what it should be.
        lengths_B: samples that count in each crop.
        config: hinge (EnCodec, section 3.4) or least squares (HiFi-GAN, section 2.4), and the weights.
    """
    crops, samples = real_BS.shape
    leaf_BS = fake_BS.detach().requires_grad_()
    learning, looking = learn(torch.cat([real_BS, fake_BS.detach()])), look(leaf_BS)

    def heard(x_BCTX: torch.Tensor) -> torch.Tensor:
        return mean_over_heard(x_BCTX.float(), lengths_B, samples)

    theirs, ours, features, right = [], [], [], []
    for (both, both_maps), (seen, seen_maps) in zip(learning, looking, strict=True):
        real, fake = both[:crops], both[crops:]
        if config.adversarial is AdversarialLoss.hinge:
            middle = 0.0
            theirs.append(heard(F.relu(1 - real)) + heard(F.relu(1 + fake)))
            ours.append(-heard(seen))
        else:
            middle = 0.5
            theirs.append(heard((1 - real).square()) + heard(fake.square()))
            ours.append(heard((1 - seen).square()))
        right.append((heard(real > middle) + heard(fake < middle)) / 2)
        for real_map, seen_map in zip(both_maps, seen_maps, strict=True):
            target = real_map[:crops].detach()
            # Relative, so that no layer counts more for being louder (EnCodec, equation 2).
            features.append(heard((seen_map - target).abs()) / heard(target.abs()).clamp_min(1e-4))
    generator_B, features_B, theirs_B, right_B = (torch.stack(each).mean(0) for each in (ours, features, theirs, right))
    weighted = config.adversarial_weight * generator_B + config.feature_weight * features_B
    (pull_BS,) = torch.autograd.grad(weighted.sum(), leaf_BS)
    return Game(generator_B.detach(), features_B.detach(), theirs_B, right_B, pull_BS)


def mean_over_heard(x_BCTX: torch.Tensor, lengths_B: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean (B,) of each crop over all axes, of time the part that ``lengths_B`` of its ``samples`` take."""
    steps = x_BCTX.shape[2]
    heard_B = (lengths_B * steps + samples - 1) // samples
    heard_BT = torch.arange(steps, device=lengths_B.device) < heard_B[:, None]
    return (x_BCTX.mean((1, 3)) * heard_BT).sum(1) / heard_B
