"""What is drawn from a distribution, and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omni_train.rollout.sampling import Sampling, uniforms

PROBABILITIES = torch.tensor([0.05, 0.4, 0.15, 0.1, 0.3])
DRAWS = (torch.arange(2000) + 0.5) / 2000  # every quantile as often


def frequencies(**options):
    drawn = Sampling(**options).choose(PROBABILITIES.log().expand(len(DRAWS), -1), DRAWS)
    return drawn.bincount(minlength=5) / len(DRAWS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(temperature=1.0), PROBABILITIES),
        (dict(temperature=0.5), PROBABILITIES**2),
        (dict(temperature=1.0, top_k=2), [0, 0.4, 0, 0, 0.3]),
        (dict(temperature=1.0, top_k=99), PROBABILITIES),
        (dict(temperature=1.0, top_p=0.71), [0, 0.4, 0.15, 0, 0.3]),
        (dict(temperature=1.0, top_p=0.69), [0, 0.4, 0, 0, 0.3]),
        (dict(temperature=0.0), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_they_should(options, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(frequencies(**options), expected / expected.sum(), atol=1e-3, rtol=0)


def test_the_numbers_of_a_prompt_do_not_depend_on_how_many_are_asked_for():
    np.testing.assert_array_equal(uniforms(7, 3, 5), uniforms(7, 3, 50)[:5])
    assert (uniforms(7, 3, 5) != uniforms(7, 4, 5)).all()
    assert (uniforms(7, 3, 5) != uniforms(8, 3, 5)).all()


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1)])
def test_figures_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="temperature and top_k"):
        Sampling(**options)
