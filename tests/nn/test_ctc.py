"""CTC without the vocabulary's log-probabilities is torch's CTC with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from omni_train.nn.ctc import CTCHead, alignable

LENGTHS = [7, 1, 12, 3, 5, 2]
TRANSCRIPTS = [torch.tensor(one) for one in ([4, 4, 9], [5], [1, 2, 3, 3, 3], [6, 6, 6], [], [0, 10])]


def problem(words: int, chunk_tokens: int, dtype=torch.float32, scale: float = 1.0):
    torch.manual_seed(3)
    head = CTCHead(6, words, chunk_tokens, {"dtype": dtype})
    torch.nn.init.normal_(head.weight, std=scale)
    return head, torch.randn(sum(LENGTHS), 6).to(dtype).requires_grad_()


def whole(head, hidden):
    """The definition: each clip alone, over the whole vocabulary."""
    losses = []
    for part, words in zip(hidden.split(LENGTHS), TRANSCRIPTS, strict=True):
        log_probs = F.linear(part, head.weight, head.bias).float().log_softmax(-1)[:, None]
        sizes = torch.tensor([len(part)]), torch.tensor([len(words)])
        options = dict(blank=head.blank, reduction="none", zero_infinity=True)
        losses.append(F.ctc_loss(log_probs, words[None].long(), *sizes, **options))
    return torch.cat(losses)


def gradients(losses, *inputs):
    weights = torch.linspace(0.5, 1.5, len(losses))
    return torch.autograd.grad((losses * weights).sum(), inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize(("words", "scale"), [(11, 1.0), (57, 1.0), (57, 30.0)])
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(words, scale, chunk_tokens):
    head, hidden = problem(words, chunk_tokens, scale=scale)
    expected, losses = whole(head, hidden), head(hidden, LENGTHS, [one.long() for one in TRANSCRIPTS])
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert alignable(LENGTHS, TRANSCRIPTS) == [True, True, True, False, True, True]
    assert losses[3] == 0  # three equal words need five audio tokens
    inputs = (hidden, head.weight, head.bias)
    for found, gradient in zip(gradients(losses, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=3e-5 * scale)


def test_a_transcript_of_every_word_leaves_none_over():
    torch.manual_seed(4)
    head, hidden = CTCHead(6, 3, 2, {}), torch.randn(9, 6, requires_grad=True)
    words = torch.tensor([2, 0, 1, 1])
    log_probs = F.linear(hidden, head.weight, head.bias).log_softmax(-1)[:, None]
    expected = F.ctc_loss(log_probs, words[None], torch.tensor([9]), torch.tensor([4]), blank=3, reduction="none")
    losses = head(hidden, [9], [words])
    torch.testing.assert_close(losses, expected)
    for found, gradient in zip(
        gradients(losses, hidden, head.bias), gradients(expected, hidden, head.bias), strict=True
    ):
        torch.testing.assert_close(found, gradient)


def test_bf16_rounds_the_logits_alone():
    head, hidden = problem(57, 4, torch.bfloat16)
    expected, losses = whole(head, hidden), head(hidden, LENGTHS, [one.long() for one in TRANSCRIPTS])
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=1e-5)
    inputs = (hidden, head.weight, head.bias)
    for found, gradient in zip(gradients(losses, *inputs), gradients(expected, *inputs), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - gradient).float().norm() < 0.02 * gradient.float().norm()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_tensor_holds_more_than_a_chunk_of_logits():
    words = 5003
    head, hidden = problem(words, 2)
    with Largest() as largest:
        losses = head(hidden, LENGTHS, [one.long() for one in TRANSCRIPTS])
        gradients(losses, hidden)
    assert largest.numel == 6 * (words + 1) < sum(LENGTHS) * (words + 1)  # the gradient of the weight, H · V
