"""Discriminators judge each crop by itself, in time order, on what their windows and periods say."""

from __future__ import annotations

import pytest
import torch

from omni_train.models.discriminators import Discriminators, NormedConv2d, PeriodDiscriminator, STFTDiscriminator
from omni_train.recipe.schema import DiscriminatorConfig
from tests.support.codec import voice


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(13)


def test_a_normed_convolution_is_torchs_weight_norm():
    ours = NormedConv2d(3, 5, (3, 2), stride=(2, 1), dilation=(2, 1), padding=(2, 1))
    with torch.no_grad():
        ours.gain.mul_(torch.rand(5) + 0.5)
    theirs = torch.nn.Conv2d(3, 5, (3, 2), stride=(2, 1), dilation=(2, 1), padding=(2, 1))
    torch.nn.utils.parametrizations.weight_norm(theirs)
    with torch.no_grad():
        theirs.bias.copy_(ours.bias)
        theirs.parametrizations.weight.original0.copy_(ours.gain.view(5, 1, 1, 1))
        theirs.parametrizations.weight.original1.copy_(ours.weight)
    x = torch.randn(2, 3, 11, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_fresh_normed_convolution_is_a_plain_one():
    ours = NormedConv2d(2, 4, (3, 3))
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(ours(x), torch.nn.functional.conv2d(x, ours.weight, ours.bias))


def test_every_crop_is_judged_alone():
    judges = Discriminators(DiscriminatorConfig([128, 32], 4, [2, 7], [4, 6]))
    crops_BS = torch.stack([voice(1003, seed) for seed in range(3)])
    together, alone = judges(crops_BS), judges(crops_BS[1:2])
    assert len(together) == 4
    for (logits, features), (its_logits, its_features) in zip(together, alone, strict=True):
        for of_all, its_own in zip([logits, *features], [its_logits, *its_features], strict=True):
            torch.testing.assert_close(of_all[1:2], its_own)


def moved(judge: torch.nn.Module, samples: int, place: int) -> list[torch.Tensor]:
    """Where the outputs change with one sample."""
    crop_1S = voice(samples, 3)[None]
    other_1S = crop_1S.clone()
    other_1S[0, place] += 0.5
    with torch.no_grad():
        (logits, features), (other_logits, other_features) = judge(crop_1S), judge(other_1S)
    maps = zip([*features, logits], [*other_features, other_logits], strict=True)
    return [(one != other)[0].any(0) for one, other in maps]


@pytest.mark.parametrize("period", [2, 5])
def test_a_period_discriminator_sees_every_pth_sample_together(period):
    place = 701
    for changed_TP in moved(PeriodDiscriminator(period, [4, 6]), 1200, place):
        assert changed_TP.shape[1] == period
        assert changed_TP.any(0).tolist() == [phase == place % period for phase in range(period)]


@pytest.mark.parametrize("judge", [PeriodDiscriminator(3, [4, 6]), STFTDiscriminator(64, 4)])
def test_time_is_the_third_axis_of_every_feature_map(judge):
    place, samples = 9000, 12000
    for changed_TX in moved(judge, samples, place):
        steps = changed_TX.any(1).nonzero().squeeze(1)
        assert steps.numel() > 0
        middle = float(steps.double().mean()) / len(changed_TX)
        assert middle == pytest.approx(place / samples, abs=0.02)


def test_the_stft_discriminator_sees_phase():
    crop_1S = voice(900, 5)[None]
    judge = STFTDiscriminator(128, 4)
    assert not torch.allclose(judge(crop_1S)[0], judge(-crop_1S)[0])


def test_it_judges_in_the_precision_of_its_weights():
    judges = Discriminators(DiscriminatorConfig([64], 3, [3], [4])).bfloat16()
    logits = [judged[0] for judged in judges(torch.randn(2, 480))]
    assert {tensor.dtype for tensor in logits} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in logits)
