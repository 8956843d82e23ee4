"""Causal and bidirectional attention within the sequences of a packed row, in memory proportional to the row.

Axis letters: T tokens, H query heads, K key/value heads, D head dimension, N sequences.
"""

from __future__ import annotations

import inspect
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# torch 2.11's has no grouped heads yet: they are repeated for it.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else None


def packed_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries_q: torch.Tensor,
    boundaries_k: torch.Tensor,
    scale: float | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """Causal attention softmax(q·kᵀ·scale)·v within each sequence, the last query aligned with the last key.

    Never holds a matrix of queries by keys, forward or backward. Axes Tq and Tk: tokens of queries and of keys.

    Args:
        query: (Tq, H, D).
        key: (Tk, K, D); query head h belongs to key/value head h // (H/K).
        value: (Tk, K, D).
        boundaries_q: (N+1,) boundaries of the sequences in the queries (cu_seqlens).
        boundaries_k: (N+1,) the same in the keys, of which a sequence has at least as many.
        scale: D^-½ by default.
        longest: upper bound of a sequence's keys; without it the host waits for the GPU.

    Returns:
        (Tq, H, D).
    """
    if _varlen_takes(query):
        return _varlen(query, key, value, boundaries_q, boundaries_k, scale, longest, causal=True)
    queries = list(pairwise(boundaries_q.tolist()))
    keys = queries if boundaries_k is boundaries_q else list(pairwise(boundaries_k.tolist()))
    if query.device.type == "cpu":
        return _FlashOnCPU.apply(query, key, value, list(zip(queries, keys, strict=True)), scale)
    return _sequence_by_sequence(query, key, value, queries, keys, scale)


def packed_bidirectional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    scale: float | None = None,
    longest: int | None = None,
) -> torch.Tensor:
    """Bidirectional attention softmax(q·kᵀ·scale)·v within each sequence.

    Neighbouring sequences of equal length are one batch of one kernel call: a row of many short ones is fast when it is
    in order of their lengths. None of torch's kernels that this comes to holds a matrix of queries by keys.

    Args:
        query, key, value: (T, H, D).
        boundaries: (N+1,) boundaries of the sequences (cu_seqlens).
        scale: D^-½ by default.
        longest: upper bound of a sequence's tokens; without it the host waits for the GPU.

    Returns:
        (T, H, D).
    """
    if _varlen_takes(query):
        return _varlen(query, key, value, boundaries, boundaries, scale, longest, causal=False)
    runs = [(length, len(list(run))) for length, run in groupby(boundaries.diff().tolist()) if length]
    # One split instead of a slice per run: the gradient of a slice is as long as the row.
    split = [x.split([length * count for length, count in runs]) for x in (query, key, value)]
    parts = []
    for (length, count), *inputs in zip(runs, *split, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in inputs)
        parts.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)


def _varlen_takes(query: torch.Tensor) -> bool:
    """Whether torch's FlashAttention over packed sequences has a kernel for these queries."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0


def _varlen(query, key, value, boundaries_q, boundaries_k, scale, longest, causal):
    """Attention by one kernel for all sequences, whose causal mask is aligned with the last key, too."""
    if longest is None:
        longest = int(boundaries_k.diff().max())
    if _GROUPED is None:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    window = (-1, 0) if causal else (-1, -1)
    ends = (boundaries_q.int(), boundaries_k.int())
    return varlen_attn(query, key, value, *ends, longest, longest, scale=scale, window_size=window, **_GROUPED or {})


def _sequence_by_sequence(query, key, value, queries, keys, scale):
    """Attention sequence by sequence, for fp32 on a GPU, with kernels of torch that do not hold the whole matrix."""
    # Not enable_gqa: the memory-efficient kernel, the one for fp32, does not know it.
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One split instead of a slice per sequence: the gradient of a slice is as long as the row.
    lengths_q, lengths_k = ([end - start for start, end in bounds] for bounds in (queries, keys))
    parts = []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True):
        if not len(q):
            continue
        mask = causal_lower_right(len(q), len(k))
        part = F.scaled_dot_product_attention(*(_heads_first(x) for x in (q, k, v)), attn_mask=mask, scale=scale)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


class _FlashOnCPU(torch.autograd.Function):
    """Torch's flash kernels for the CPU, sequence by sequence, without a copy of the row or of the key/value heads.

    These kernels align the causal triangle to the first key. Where a sequence has more keys than queries, the keys
    before the triangle are a second call. Each half's output is the softmax over its own keys; with the logarithms of
    their denominators they add up to the softmax over all. Backward, each half is given the *whole* output and
    denominator, from which the kernel computes exactly that half's share of the gradients.
    """

    @staticmethod
    def forward(ctx, query, key, value, sequences, scale):
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        logsumexp = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        for (start, end), keys in sequences:
            q = _heads_first(query[start:end])
            whole = log_denominator = None
            for first, last, causal in _halves(end - start, *keys):
                part, log_part = _flash(
                    q, _heads_first(key[first:last]), _heads_first(value[first:last]), 0.0, causal, scale=scale
                )
                if whole is None:
                    whole, log_denominator = part, log_part
                else:
                    log_sum = torch.logaddexp(log_denominator, log_part)
                    whole = whole * (log_denominator - log_sum).exp().unsqueeze(-1)
                    whole = whole + part * (log_part - log_sum).exp().unsqueeze(-1)
                    log_denominator = log_sum
            if whole is not None:
                out[start:end] = whole[0].transpose(0, 1)
                logsumexp[start:end] = log_denominator[0].T
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.sequences, ctx.scale = sequences, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, logsumexp = ctx.saved_tensors
        grad = grad.contiguous()
        grad_query, grad_key, grad_value = (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        for (start, end), keys in ctx.sequences:
            g, q, o = (_heads_first(x[start:end]) for x in (grad, query, out))
            log_denominator = logsumexp[start:end].T.unsqueeze(0)
            for first, last, causal in _halves(end - start, *keys):
                k, v = _heads_first(key[first:last]), _heads_first(value[first:last])
                grads = _flash_backward(g, q, k, v, o, log_denominator, 0.0, causal, scale=ctx.scale)
                part_q, part_k, part_v = (x[0].transpose(0, 1) for x in grads)
                grad_query[start:end] += part_q
                grad_key[first:last] = part_k
                grad_value[first:last] = part_v
        return grad_query, grad_key, grad_value, None, None


def _halves(queries: int, start: int, end: int) -> list[tuple[int, int, bool]]:
    """(first key, end of keys, causal) of a sequence's causal triangle, and of the keys before it if there are any."""
    halves = [(end - queries, end, True), (start, end - queries, False)]
    return [half for half in halves if queries and half[0] < half[1]]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """View with heads first, (T, heads, D) -> (1, heads, T, D)."""
    return x.transpose(0, 1).unsqueeze(0)
