"""The kernel that takes the place of a miscompiled one gives the gradients that autograd gives."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from omni_train.nn.hopper_repair import chunk_bwd_dqkwg

H, K, V, C, SCALE = 3, 5, 7, 8, 0.31


def chunks(cu_seqlens):
    """(start, end, index in the sequence, sequence) of each chunk of `C` tokens."""
    found = []
    for sequence, (start, end) in enumerate(pairwise(cu_seqlens)):
        for number, begin in enumerate(range(start, end, C)):
            found.append((begin, min(begin + C, end), number, sequence))
    return found


def objective(q, k, w, g, v, do, dv, h, dh, bounds):
    """What the chunks make of their inputs, weighted by the gradients that come back: outputs, states, and v − w·h."""
    total = 0.0
    for n, (start, end, *_) in enumerate(bounds):
        q_, k_, w_, v_, do_, dv_ = (x[0, start:end].transpose(0, 1) for x in (q, k, w, v, do, dv))
        g_ = g[0, start:end].T
        decay = (g_[:, :, None] - g_[:, None, :]).tril().exp2().tril()
        out = (q_ @ h[0, n]) * g_.exp2()[..., None] + ((q_ @ k_.mT) * decay) @ v_
        after = h[0, n] * g_[:, -1, None, None].exp2() + (k_ * (g_[:, -1:] - g_).exp2()[..., None]).mT @ v_
        total = total + SCALE * (out * do_).sum() + (after * dh[0, n]).sum() - ((w_ @ h[0, n]) * dv_).sum()
    return total


@pytest.mark.parametrize("strength", [0.4, 60.0], ids=["mild", "more decay than fp32 holds"])
def test_gradients_are_those_of_autograd(strength):
    torch.manual_seed(23)
    cu_seqlens = [0, 13, 14, 30, 51]
    bounds, T = chunks(cu_seqlens), cu_seqlens[-1]
    q, k, w = (torch.randn(1, T, H, K, dtype=torch.float64, requires_grad=True) for _ in range(3))
    v, do, dv = (torch.randn(1, T, H, V, dtype=torch.float64) for _ in range(3))
    h, dh = (torch.randn(1, len(bounds), H, K, V, dtype=torch.float64) for _ in range(2))
    steps = -torch.rand(1, T, H, dtype=torch.float64) * strength
    g = torch.cat([steps[:, start:end].cumsum(1) for start, end, *_ in bounds], 1).requires_grad_()
    want = torch.autograd.grad(objective(q, k, w, g, v, do, dv, h, dh, bounds), (q, k, w, g))
    indices = torch.tensor([[sequence, number] for _, _, number, sequence in bounds])
    narrow = [x.detach().float() for x in (q, k, v, do, h, dh, w, g)]
    got = chunk_bwd_dqkwg(
        *narrow,
        dv=dv.float(),
        scale=SCALE,
        cu_seqlens=torch.tensor(cu_seqlens),
        chunk_size=C,
        chunk_indices=indices,
    )
    # The kernel's dg is that of the natural logarithm, which is what the decays are given in.
    for name, mine, theirs in zip("qkwg", got, (*want[:3], want[3] / math.log(2)), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_what_the_gated_delta_rule_does_not_use_is_refused():
    x = torch.zeros(1, 8, H, K)
    with pytest.raises(NotImplementedError, match="gated delta rule"):
        chunk_bwd_dqkwg(x, x, x, x, x, x)
