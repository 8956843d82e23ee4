"""Cross-entropy over a vocabulary too large for its logits to exist.

A row of 262,144 tokens over 248,320 words would need 260 GB of fp32 logits. Here the logits of a few positions at a
time are computed, turned into their own gradient in place, used for the gradients of the hidden states and of the
output weight, and overwritten by the next ones. That costs three matrix products per position, as many as the unchunked
loss; what makes it possible is that the weight of every position in the loss is known before the backward pass.

Axis letters: T tokens of the row, H hidden, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from omni_train.data.rows.batch import IGNORE


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    chunk_tokens: int,
    tp_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int = IGNORE,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy of ``hidden @ weight.T``, split over the vocabulary by tensor parallelism.

    Positions that are ignored cost nothing: their logits are never computed.

    Args:
        hidden: (T, H), the same on every tensor-parallel rank; with `sequence_parallel` this rank's (T / tp, H).
        weight: (V / tp, H), this rank's slice of the output weight.
        labels: (T,) int64 in [0, V), or `ignore_index`; the same on every tensor-parallel rank.
        loss_weights: (T,) weight of each position in the sum; no gradient flows to it.
        chunk_tokens: positions whose logits exist at once. The peak is one fp32 buffer of C × V / tp.
        tp_group: the ranks that share the vocabulary, in its order; None for one rank.
        sequence_parallel: whether `hidden` is split over them too.
        ignore_index: label of positions without a loss.

    Returns:
        The weighted sum (scalar float32, the same on every tensor-parallel rank) and the loss of every position in
        nats, (T,) float32, detached, 0 where ignored. The sum can be differentiated once; its gradient with respect to
        `hidden` is complete on every rank, with `sequence_parallel` for this rank's positions.
    """
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, loss_weights, chunk_tokens, group, sequence_parallel, ignore_index, with_grad
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, loss_weights, chunk_tokens, group, sequence_parallel, ignore_index, with_grad
    ):
        sequence_parallel = sequence_parallel and group is not None
        if sequence_parallel:
            hidden = _all_gather(hidden, group)
        rank = group.rank() if group else 0
        words = weight.shape[0]
        need_hidden, need_weight = (with_grad and needed for needed in ctx.needs_input_grad[:2])

        positions = (labels != ignore_index).nonzero().squeeze(1)
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        # One buffer for all chunks: allocated anew, the last chunk's logits could still be alive beside the next one's.
        buffer = hidden.new_empty(min(chunk_tokens, len(positions)), words, dtype=torch.float32)

        for chunk in positions.split(chunk_tokens):
            hidden_CH = hidden[chunk]
            logits_CV = buffer[: len(chunk)]
            if hidden.dtype == torch.float32:
                torch.mm(hidden_CH, weight.t(), out=logits_CV)
            else:
                logits_CV.copy_(hidden_CH @ weight.t())

            maximum_C = logits_CV.amax(1)
            if group:
                all_reduce(maximum_C, ReduceOp.MAX, group=group)
            logits_CV.sub_(maximum_C[:, None])
            # The word is read where it is; on other ranks (clamped) position 0 stands in, and counts nothing.
            word_C = labels[chunk] - rank * words
            here_C = (word_C >= 0) & (word_C < words)
            word_C.clamp_(0, words - 1)
            target_C = logits_CV.gather(1, word_C[:, None]).squeeze(1) * here_C
            exp_CV = logits_CV.exp_()
            sum_C = exp_CV.sum(1)
            if group:
                both_2C = torch.stack((sum_C, target_C))
                all_reduce(both_2C, group=group)
                sum_C, target_C = both_2C
            losses[chunk] = sum_C.log() - target_C

            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax - onehot = (exp - onehot · sum) / sum: dividing the narrow factors by `sum`
            # instead saves a pass over the wide one, and the subtraction happens before any rounding to bf16.
            exp_CV.scatter_add_(1, word_C[:, None], (-sum_C * here_C)[:, None])
            scale_C1 = (loss_weights[chunk].float() / sum_C)[:, None]
            grad_CV = exp_CV.to(hidden.dtype)
            if need_hidden:
                grad_hidden[chunk] = ((grad_CV @ weight) * scale_C1).to(hidden.dtype)
            if need_weight:
                scaled_CH = (hidden_CH * scale_C1).to(hidden.dtype)
                if hidden.dtype == torch.float32:
                    grad_weight.addmm_(grad_CV.t(), scaled_CH)
                else:
                    grad_weight += grad_CV.t() @ scaled_CH

        if need_hidden and group:
            grad_hidden = _reduce_scatter(grad_hidden, group) if sequence_parallel else grad_hidden
            if not sequence_parallel:
                all_reduce(grad_hidden, group=group)
        # Accumulated in fp32 over chunks and rounded once, as a parameter's gradient is.
        ctx.gradients = (grad_hidden, grad_weight.to(weight.dtype) if need_weight else None)
        ctx.mark_non_differentiable(losses)
        return (losses * loss_weights).sum(), losses

    @staticmethod
    def backward(ctx, grad_output, _):
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy can be differentiated only once: its gradients are not kept")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(grad_output) for gradient in gradients)
        return *scaled, *(None,) * 7


def _all_gather(hidden: Tensor, group: ProcessGroup) -> Tensor:
    whole = hidden.new_empty(hidden.shape[0] * group.size(), *hidden.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _reduce_scatter(gradient: Tensor, group: ProcessGroup) -> Tensor:
    part = gradient.new_empty(gradient.shape[0] // group.size(), *gradient.shape[1:])
    torch.distributed.reduce_scatter_tensor(part, gradient, group=group)
    return part
