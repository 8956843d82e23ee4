import pytest

from omni_train.recipe.schema import Decay, OptimizerConfig, ScheduleConfig
from omni_train.training.schedule import Schedule


def schedule(**options) -> Schedule:
    config = ScheduleConfig(**({"steps": 50, "global_batch": 2, "warmup_fraction": 0.1} | options))
    return Schedule(config, OptimizerConfig(lr=2.0, min_lr=0.5))


def test_warm_up_rises_in_equal_steps_to_the_peak():
    rates = [schedule().learning_rate(step, 0) for step in range(6)]
    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


def test_cosine_passes_the_middle_half_way_and_ends_at_the_minimum():
    cosine = schedule(decay=Decay.cosine, warmup_fraction=0.0)
    assert cosine.learning_rate(0, 0) == pytest.approx(2.0)
    assert cosine.learning_rate(25, 0) == pytest.approx(1.25)
    assert cosine.learning_rate(50, 0) == pytest.approx(0.5)


def test_wsd_is_flat_until_its_decay():
    wsd = schedule(decay=Decay.wsd, decay_fraction=0.2)
    assert {wsd.learning_rate(step, 0) for step in range(5, 41)} == {2.0}
    assert wsd.learning_rate(45, 0) == pytest.approx(1.25)
    assert wsd.learning_rate(50, 0) == pytest.approx(0.5)


def test_constant_never_decays():
    assert schedule(decay=Decay.constant).learning_rate(49, 0) == 2.0


def test_a_length_in_tokens_decides_when_it_comes_first():
    by_tokens = schedule(tokens=1000, warmup_fraction=0.0, decay=Decay.cosine)
    assert by_tokens.learning_rate(3, 500) == pytest.approx(1.25)
    assert not by_tokens.done(3, 999)
    assert by_tokens.done(3, 1000)
    assert by_tokens.done(50, 10)


def test_warm_up_in_tokens_never_starts_from_zero():
    by_tokens = schedule(tokens=1000, steps=100_000)
    rates = [by_tokens.learning_rate(step, 20 * step) for step in range(7)]
    assert 0 < rates[0] < rates[1] < rates[4] <= 2.0
    assert rates[5] == pytest.approx(2.0)
