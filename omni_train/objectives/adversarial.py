"""Losses of a generator of waveforms against discriminators, crop by crop.

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
class AdversarialLosses:
    """Losses (B,) of each crop, means over the discriminators, and their gradient by the generated waveform."""

    generator: torch.Tensor
    """Adversarial loss of the generator, without gradient."""
    features: torch.Tensor
    """Feature-matching loss of the generator, without gradient."""
    discriminators: torch.Tensor
    """Loss of the discriminators, with their gradient."""
    accuracy: torch.Tensor
    """Fraction of the logits that tell real from generated rightly."""
    waveform_gradient: torch.Tensor
    """(B, S) gradient by the generated waveform of both losses of the generator, weighted and summed over the crops."""


def adversarial_losses(
    wrapped: Callable[[torch.Tensor], list[DiscriminatorOutput]],
    unwrapped: Callable[[torch.Tensor], list[DiscriminatorOutput]],
    generated_BS: torch.Tensor,
    real_BS: torch.Tensor,
    lengths_B: torch.Tensor,
    config: CodecTrainingConfig,
) -> AdversarialLosses:
    """Losses of generator and discriminators; those of the generator leave no gradient in the discriminators.

    Args:
        wrapped: the discriminators as the engine wraps them, for their own loss.
        unwrapped: the same discriminators without the engine's wrapper, for the losses of the generator.
        generated_BS: waveforms of the generator.
        real_BS: the waveforms that it should generate.
        lengths_B: samples that count in each crop.
        config: hinge (EnCodec, section 3.4) or least squares (HiFi-GAN, section 2.4), and the weights.
    """
    crops, samples = real_BS.shape
    leaf_BS = generated_BS.detach().requires_grad_()
    for_discriminators = wrapped(torch.cat([real_BS, generated_BS.detach()]))
    for_generator = unwrapped(leaf_BS)

    def mean(x_BCTX: torch.Tensor) -> torch.Tensor:
        return masked_mean(x_BCTX.float(), lengths_B, samples)

    discriminators, generator, features, accuracy = [], [], [], []
    for (both, both_maps), (judged, judged_maps) in zip(for_discriminators, for_generator, strict=True):
        real, generated = both[:crops], both[crops:]
        if config.adversarial is AdversarialLoss.hinge:
            middle = 0.0
            discriminators.append(mean(F.relu(1 - real)) + mean(F.relu(1 + generated)))
            generator.append(-mean(judged))
        else:
            middle = 0.5
            discriminators.append(mean((1 - real).square()) + mean(generated.square()))
            generator.append(mean((1 - judged).square()))
        accuracy.append((mean(real > middle) + mean(generated < middle)) / 2)
        for real_map, judged_map in zip(both_maps, judged_maps, strict=True):
            target = real_map[:crops].detach()
            # Relative, so that no layer counts more for being louder (EnCodec, equation 2).
            features.append(mean((judged_map - target).abs()) / mean(target.abs()).clamp_min(1e-4))
    generator_B, features_B, discriminators_B, accuracy_B = (
        torch.stack(each).mean(0) for each in (generator, features, discriminators, accuracy)
    )
    weighted = config.adversarial_weight * generator_B + config.feature_weight * features_B
    (gradient_BS,) = torch.autograd.grad(weighted.sum(), leaf_BS)
    return AdversarialLosses(generator_B.detach(), features_B.detach(), discriminators_B, accuracy_B, gradient_BS)


def masked_mean(x_BCTX: torch.Tensor, lengths_B: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean (B,) of each crop over all axes, without the time steps behind its end.

    Args:
        x_BCTX: values at the time steps of the crops.
        lengths_B: samples that count in each crop.
        samples: length of the crops, which the time steps divide evenly.
    """
    steps = x_BCTX.shape[2]
    count_B = (lengths_B * steps + samples - 1) // samples
    mask_BT = torch.arange(steps, device=lengths_B.device) < count_B[:, None]
    return (x_BCTX.mean((1, 3)) * mask_BT).sum(1) / count_B
