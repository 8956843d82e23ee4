"""Recomputation: the gradients are those of the plain pass, and what runs again knows it."""

from __future__ import annotations

import pytest
import torch

from omni_train.nn.recompute import checkpoint, recomputing


@pytest.mark.parametrize("needs_gradient", [False, True], ids=["frozen", "trained"])
def test_gradients_are_those_of_the_plain_pass_whatever_the_inputs_need(needs_gradient):
    torch.manual_seed(3)
    linear = torch.nn.Linear(3, 5)
    x = torch.randn(4, 3, requires_grad=needs_gradient)
    inputs = [linear.weight, linear.bias, *([x] if needs_gradient else [])]
    expected = torch.autograd.grad(linear(x).tanh().square().sum(), inputs)
    found = torch.autograd.grad(checkpoint(lambda x: linear(x).tanh().square(), x).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_everything_runs_once_more_to_its_end_and_knows_it():
    """The last sum keeps nothing: whoever stopped where all is there would leave it out, and a collective with it."""
    linear, ends = torch.nn.Linear(3, 5), []

    def function(x):
        out = linear(x).tanh() + 1
        ends.append(recomputing())
        return out

    out = checkpoint(function, torch.ones(2, 3))
    assert ends == [False]
    out.sum().backward()
    assert ends == [False, True]
    assert not recomputing()
