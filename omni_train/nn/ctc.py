"""CTC over a vocabulary too large for its log-probabilities to exist.

An hour of audio has 22,500 audio tokens; over 248,320 words their fp32 logarithms are 22 GB, and their gradient as many
again. But the loss of a clip is a function of the words in its transcript, the blank, and all other words together: it
is CTC over so many classes, whose logits are the words' own and the log-sum-exp of the others'. Those are computed a
few audio tokens at a time, and so is the gradient, for which the logits are computed a second time.

Axis letters: A audio tokens of all clips, N clips, K classes of a clip, V words and the blank, C audio tokens of one
chunk, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from omni_train.nn.cross_decoder import Spans

_NOTHING = -1e30
"""Logit of a class that cannot occur: minus infinity would make CTC's gradient NaN."""


def alignable(audio_lengths: list[int], transcripts: list[Tensor]) -> list[bool]:
    """Which clips CTC can align: every token needs an audio token, and two equal ones in a row a blank between them.

    Args:
        audio_lengths: audio tokens of each clip.
        transcripts: token ids of each clip.
    """
    return [
        len(words) + int((words[1:] == words[:-1]).sum()) <= length
        for words, length in zip(transcripts, audio_lengths, strict=True)
    ]


class CTCHead(torch.nn.Linear):
    """CTC head: a linear layer to the vocabulary and the blank, with the loss of Graves et al. (2006).

    Args:
        hidden_size: H.
        vocab_size: tokens of the vocabulary; the blank is the class after the last.
        chunk_tokens: audio tokens whose logits exist at once, in fp32.
        where: device and dtype of the parameters.
    """

    def __init__(self, hidden_size: int, vocab_size: int, chunk_tokens: int, where: dict) -> None:
        super().__init__(hidden_size, vocab_size + 1, **where)
        self.blank, self.chunk_tokens = vocab_size, chunk_tokens

    def forward(self, hidden_AH: Tensor, audio_lengths: list[int], transcripts: list[Tensor]) -> Tensor:
        """CTC loss of each clip, (N,) fp32 in nats, 0 where a clip cannot be aligned.

        Args:
            hidden_AH: encoder output of all clips, one after the other.
            audio_lengths: audio tokens of each clip.
            transcripts: int64 token ids of each clip, on the CPU.
        """
        device = hidden_AH.device
        spans = Spans(audio_lengths, device)
        words, labels = zip(*(one.unique(return_inverse=True) for one in transcripts), strict=True)
        blank = torch.tensor([self.blank])
        classes_NK = pad_sequence([torch.cat([blank, one]) for one in words], True, padding_value=self.blank)
        missing_NK = classes_NK == self.blank
        missing_NK[:, 0] = False
        classes_NK, missing_NK = classes_NK.to(device), missing_NK.to(device)
        clip_A = torch.repeat_interleave(torch.arange(len(words)), torch.tensor(audio_lengths)).to(device)
        own_AK, others_A = _ClassLogits.apply(hidden_AH, self.weight, self.bias, classes_NK, clip_A, self.chunk_tokens)
        own_AK = own_AK.masked_fill(missing_NK[clip_A], _NOTHING)
        log_probs_AK = torch.cat([own_AK, others_A[:, None]], dim=1).log_softmax(-1)
        # Not `pad_sequence`, whose backward pass copies the whole gradient once for every clip.
        return F.ctc_loss(
            spans.pad(log_probs_AK).transpose(0, 1),
            torch.cat(labels).to(device) + 1,
            torch.tensor(audio_lengths, device=device),
            torch.tensor([len(one) for one in transcripts], device=device),
            blank=0,
            reduction="none",
            zero_infinity=True,
        )

    @torch.no_grad()
    def best_path(self, hidden_AH: Tensor, audio_lengths: list[int]) -> list[list[int]]:
        """Token ids of each clip by best path decoding: the likeliest class of each audio token, repetitions and blanks
        taken out (Graves et al. 2006, section 3.2).

        Args: as `forward`.
        """
        best = [F.linear(part, self.weight, self.bias).argmax(1) for part in hidden_AH.split(self.chunk_tokens)]
        of_clips = torch.cat(best).cpu().split(audio_lengths)
        return [[one for one in clip.unique_consecutive().tolist() if one != self.blank] for clip in of_clips]


class _ClassLogits(torch.autograd.Function):
    """Logits of each clip's own classes, (A, K) fp32, and the log-sum-exp of all others, (A,) fp32.

    A class may be there twice, if one of both has no gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, classes_NK, clip_A, chunk_tokens):
        own_AK = hidden.new_empty(len(hidden), classes_NK.shape[1], dtype=torch.float32)
        others_A = hidden.new_empty(len(hidden), dtype=torch.float32)
        for chunk, logits_CV in _chunks(hidden, weight, bias, chunk_tokens):
            classes_CK = classes_NK[clip_A[chunk]]
            own_AK[chunk] = logits_CV.gather(1, classes_CK)
            logits_CV.scatter_(1, classes_CK, -torch.inf)
            maximum_C = logits_CV.amax(1).clamp_(min=_NOTHING)
            sum_C = logits_CV.sub_(maximum_C[:, None]).exp_().sum(1)
            others_A[chunk] = (sum_C.log_() + maximum_C).clamp_(min=_NOTHING)
        ctx.save_for_backward(hidden, weight, bias, classes_NK, clip_A, others_A)
        ctx.chunk_tokens = chunk_tokens
        return own_AK, others_A

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_own_AK, grad_others_A):
        hidden, weight, bias, classes_NK, clip_A, others_A = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight, grad_bias = (torch.zeros_like(x, dtype=torch.float32) for x in (weight, bias))
        for chunk, logits_CV in _chunks(hidden, weight, bias, ctx.chunk_tokens):
            classes_CK = classes_NK[clip_A[chunk]]
            exact_CV = logits_CV.sub_(others_A[chunk, None]).exp_().mul_(grad_others_A[chunk, None])
            exact_CV.scatter_(1, classes_CK, 0.0).scatter_add_(1, classes_CK, grad_own_AK[chunk])
            grad_bias += exact_CV.sum(0)
            grad_CV = exact_CV.to(hidden.dtype)
            grad_hidden[chunk] = grad_CV @ weight
            grad_weight += grad_CV.t() @ hidden[chunk]
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None, None


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor, chunk_tokens: int):
    """Chunks of the audio tokens, as slices, with their logits (C, V) fp32; all share one buffer."""
    buffer = hidden.new_empty(min(chunk_tokens, len(hidden)), len(weight), dtype=torch.float32)
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, min(start + chunk_tokens, len(hidden)))
        logits_CV = buffer[: chunk.stop - start]
        logits_CV.copy_(F.linear(hidden[chunk], weight, bias))
        yield chunk, logits_CV
