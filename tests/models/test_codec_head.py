"""The loss of codebook 0 is masked as drawing is."""

import pytest
import torch
import torch.nn.functional as F

from omni_train.data.rows.batch import IGNORE
from omni_train.models.talker.codec_head import masked_cross_entropy

POSITIONS, CODES, WIDTH = 37, 53, 11


def problem():
    """States, head, labels, weights, and the codes that may be drawn: two of three, every label among them."""
    torch.manual_seed(17)
    drawable = torch.arange(CODES) % 3 != 1
    labels = drawable.nonzero().squeeze(1)[torch.randint(int(drawable.sum()), (POSITIONS,))]
    labels[torch.rand(POSITIONS) < 0.3] = IGNORE
    return torch.randn(POSITIONS, WIDTH), torch.randn(CODES, WIDTH), labels, torch.rand(POSITIONS) * 2, drawable


def test_codes_that_may_not_be_drawn_have_no_share_in_the_loss_and_no_gradient():
    hidden, weight, labels, weights, drawable = problem()
    ours = [value.clone().requires_grad_() for value in (hidden, weight)]
    total, losses = masked_cross_entropy(*ours, labels, weights, drawable, chunk_tokens=8)
    total.backward()

    theirs = [value.clone().requires_grad_() for value in (hidden, weight)]
    log_probs = (theirs[0] @ theirs[1].T).masked_fill(~drawable, -torch.inf).log_softmax(1)
    expected = F.nll_loss(log_probs, labels, reduction="none", ignore_index=IGNORE)
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, (expected * weights).sum())
    torch.testing.assert_close([value.grad for value in ours], [value.grad for value in theirs])
    assert not ours[1].grad[~drawable].any() and ours[1].grad[drawable].any(1).all()


def test_a_label_that_may_not_be_drawn_is_refused():
    hidden, weight, labels, weights, drawable = problem()
    labels[11] = 4
    with pytest.raises(ValueError, match=r"labels \[4\] are codes that may not be drawn"):
        masked_cross_entropy(hidden, weight, labels, weights, drawable, chunk_tokens=8)
