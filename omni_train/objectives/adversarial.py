"""The game of generator and discriminators on waveforms, crop by crop.

Axis letters: B crops, S samples, C channels, T time, X frequencies or samples of a period.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from omni_train.models.discriminators import Judgement
from omni_train.recipe.speech import AdversarialLoss


@dataclass
class Game:
    """Losses of each crop (B,), means over the discriminators."""

    generator: torch.Tensor
    features: torch.Tensor
    discriminators: torch.Tensor
    right: torch.Tensor  # part of the logits that lie on the right side


def play(
    judge: Callable[[torch.Tensor], list[Judgement]],
    discriminators: torch.nn.Module,
    fake_BS: torch.Tensor,
    real_BS: torch.Tensor,
    lengths_B: torch.Tensor,
    kind: AdversarialLoss,
) -> Game:
    """Let the discriminators judge; their loss reaches nothing but them, the generator's nothing but ``fake_BS``.

    Args:
        judge: the discriminators' forward, as the engine wraps it.
        discriminators: they themselves.
        fake_BS: of the generator.
        real_BS: what it should be.
        lengths_B: samples that count in each crop.
        kind: hinge (EnCodec, section 3.4) or least squares (HiFi-GAN, section 2.4).
    """
    crops, samples = real_BS.shape
    learning = judge(torch.cat([real_BS, fake_BS.detach()]))
    with frozen(discriminators):
        looking = judge(fake_BS)

    def heard(x_BCTX: torch.Tensor) -> torch.Tensor:
        return mean_over_heard(x_BCTX, lengths_B, samples)

    theirs, ours, features, right = [], [], [], []
    for (both, both_maps), (fake, fake_maps) in zip(learning, looking, strict=True):
        real_logits, fake_logits = both[:crops].float(), both[crops:].float()
        if kind is AdversarialLoss.hinge:
            middle = 0.0
            theirs.append(heard(F.relu(1 - real_logits)) + heard(F.relu(1 + fake_logits)))
            ours.append(-heard(fake.float()))
        else:
            middle = 0.5
            theirs.append(heard((1 - real_logits).square()) + heard(fake_logits.square()))
            ours.append(heard((1 - fake.float()).square()))
        right.append((heard((real_logits > middle).float()) + heard((fake_logits < middle).float())) / 2)
        for real_map, fake_map in zip(both_maps, fake_maps, strict=True):
            target = real_map[:crops].detach().float()
            # Relative, so that no layer counts more for being louder (EnCodec, equation 2).
            features.append(heard((fake_map.float() - target).abs()) / heard(target.abs()).clamp_min(1e-4))
    return Game(*(torch.stack(losses).mean(0) for losses in (ours, features, theirs, right)))


def mean_over_heard(x_BCTX: torch.Tensor, lengths_B: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean (B,) of each crop over all axes, of time the part that ``lengths_B`` of its ``samples`` take."""
    steps = x_BCTX.shape[2]
    heard_B = (lengths_B * steps + samples - 1) // samples
    heard_BT = torch.arange(steps, device=lengths_B.device) < heard_B[:, None]
    return (x_BCTX.mean((1, 3)) * heard_BT).sum(1) / heard_B


@contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """What is computed inside leaves no gradient in the module's parameters, and passes it on to its inputs."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
