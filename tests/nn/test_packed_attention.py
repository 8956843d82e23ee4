"""The packed kernel is attention within each sequence, in memory proportional to the row."""

import resource
from itertools import pairwise

import pytest
import torch

from omni_train.nn import packed_attention
from omni_train.nn.packed_attention import (
    _sequence_by_sequence,
    packed_bidirectional_attention,
    packed_causal_attention,
)

BOUNDARIES_Q = torch.tensor([0, 5, 5, 70, 71], dtype=torch.int32)
BOUNDARIES_K = torch.tensor([0, 5, 5, 130, 190], dtype=torch.int32)


def problem(kv_heads, tokens_q, tokens_k, heads=6, head_dim=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(51)
    shapes = [(tokens_q, heads, head_dim)] + 2 * [(tokens_k, kv_heads, head_dim)] + [(tokens_q, heads, head_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(attention, query, key, value, grad, boundaries_q, boundaries_k):
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    out = attention(*inputs, boundaries_q, boundaries_k)
    out.backward(grad)
    return out.detach(), *(x.grad for x in inputs)


def separate(query, key, value, boundaries_q, boundaries_k):
    """Softmax of a masked matrix, one sequence at a time."""
    outs = []
    for (start, end), (first, last) in zip(
        pairwise(boundaries_q.tolist()), pairwise(boundaries_k.tolist()), strict=True
    ):
        q, k, v = query[start:end], key[first:last], value[first:last]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outs)


def by_sequence(query, key, value, boundaries_q, boundaries_k):
    """The kernel for GPUs, which runs anywhere."""
    queries, keys = (list(pairwise(boundaries.tolist())) for boundaries in (boundaries_q, boundaries_k))
    return _sequence_by_sequence(query, key, value, queries, keys, None)


@pytest.mark.parametrize("attention", [packed_causal_attention, by_sequence])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_packed_equals_separate_with_gradients(attention, kv_heads):
    inputs = problem(kv_heads, 71, 71)
    expected = run(separate, *inputs, BOUNDARIES_Q, BOUNDARIES_Q)
    torch.testing.assert_close(run(attention, *inputs, BOUNDARIES_Q, BOUNDARIES_Q), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", [packed_causal_attention, by_sequence])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_queries_are_aligned_to_the_last_keys(attention, kv_heads):
    inputs = problem(kv_heads, 71, 190)
    expected = run(separate, *inputs, BOUNDARIES_Q, BOUNDARIES_K)
    torch.testing.assert_close(run(attention, *inputs, BOUNDARIES_Q, BOUNDARIES_K), expected, rtol=1e-4, atol=1e-5)


def test_bf16_stays_close_to_fp32():
    inputs = problem(2, 71, 190, dtype=torch.bfloat16)
    expected = run(separate, *(x.float() for x in inputs), BOUNDARIES_Q, BOUNDARIES_K)
    got = run(packed_causal_attention, *inputs, BOUNDARIES_Q, BOUNDARIES_K)
    assert all(x.dtype == torch.bfloat16 for x in got)
    torch.testing.assert_close([x.float() for x in got], list(expected), rtol=0.03, atol=0.03)


def test_views_of_a_wider_projection_and_an_expanded_gradient_are_read_right():
    """As they come from a split projection, and from `sum().backward()`."""
    mixed = torch.randn(71, 8, 24, generator=torch.Generator().manual_seed(52)).requires_grad_()
    query, key, value = mixed.split([4, 2, 2], dim=1)
    packed_causal_attention(query, key, value, BOUNDARIES_Q, BOUNDARIES_Q).sum().backward()
    ours, mixed.grad = mixed.grad, None
    separate(*mixed.split([4, 2, 2], dim=1), BOUNDARIES_Q, BOUNDARIES_Q).sum().backward()
    torch.testing.assert_close(ours, mixed.grad, rtol=1e-4, atol=1e-5)


def both_ways(query, key, value, boundaries):
    """Softmax over all keys of each sequence, one at a time."""
    outs = []
    for start, end in pairwise(boundaries.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * query.shape[-1] ** -0.5
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end]))
    return torch.cat(outs)


@pytest.mark.parametrize("lengths", [[71], [4] * 5 + [0, 4, 9, 9, 1, 28], [1] * 71])
def test_bidirectional_attention_stays_within_each_sequence(lengths):
    inputs = problem(6, 71, 71)
    boundaries = torch.tensor([0, *lengths]).cumsum(0)

    def result(attention):
        query, key, value = (x.clone().requires_grad_() for x in inputs[:3])
        out = attention(query, key, value, boundaries)
        out.backward(inputs[3])
        return out.detach(), query.grad, key.grad, value.grad

    torch.testing.assert_close(result(packed_bidirectional_attention), result(both_ways), rtol=1e-4, atol=1e-5)


def test_neighbours_of_equal_length_are_one_kernel_call(monkeypatch):
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    counted = lambda *args, **options: calls.append(args[0].shape) or kernel(*args, **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    boundaries = torch.tensor([0] + [4] * 3000 + [50] * 200).cumsum(0)
    query, key, value, _ = problem(2, 22_000, 22_000, heads=2, head_dim=8)
    packed_bidirectional_attention(query, key, value, boundaries)
    assert calls == [(3000, 2, 4, 8), (200, 2, 50, 8)]


def memory_growth(rank, world_size, tokens, head_dim):
    """Bytes that one long sequence, and one half of it as context parallelism cuts it, add to this process's peak."""
    inputs = problem(1, tokens, tokens, heads=1, head_dim=head_dim)
    whole = torch.tensor([0, tokens])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(packed_causal_attention, *inputs, whole, whole)
    query, key, value, grad = inputs
    half = torch.tensor([0, tokens // 2])
    run(packed_causal_attention, query[: tokens // 2], key, value, grad[: tokens // 2], half, whole)
    both = [x.clone().requires_grad_() for x in (query, key, value)]
    packed_bidirectional_attention(*both, whole).backward(grad)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_a_long_row_never_holds_a_matrix_of_queries_by_keys(distributed):
    tokens = 12_288
    (growth,) = distributed(1, memory_growth, tokens, 24)
    assert growth < 4 * tokens**2 / 8


def varlen_stand_in(grouped: bool):
    """What torch documents of ``varlen_attn``, sequence by sequence; before 2.12 it knew no grouped heads."""

    def attend(query, key, value, ends_q, ends_k, most_q, most_k, *, scale, window_size, enable_gqa=False):
        assert {ends_q.dtype, ends_k.dtype} == {torch.int32}
        assert most_q >= ends_q.diff().max() and most_k >= ends_k.diff().max()
        assert (enable_gqa is grouped) and (grouped or query.shape[1] == key.shape[1]) and scale is None
        if window_size == (-1, 0):
            return separate(query, key, value, ends_q, ends_k)
        assert window_size == (-1, -1)
        return packed_bidirectional_attention(query, key, value, ends_q)

    return attend


@pytest.mark.parametrize("grouped", [True, False])
def test_flash_attention_is_asked_for_what_is_meant(monkeypatch, grouped):
    """A GPU's kernel for bf16, whose arguments other torches take differently; here it is played in torch."""
    inputs = problem(2, 71, 190)
    expected = run(packed_causal_attention, *inputs, BOUNDARIES_Q, BOUNDARIES_K)
    both_ways = packed_bidirectional_attention(*problem(6, 71, 71)[:3], BOUNDARIES_Q)
    monkeypatch.setattr(packed_attention, "_GROUPED", {"enable_gqa": True} if grouped else None)
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_stand_in(grouped))
    for longest in (None, 200):
        got = packed_attention._varlen(*inputs[:3], BOUNDARIES_Q.long(), BOUNDARIES_K, None, longest, causal=True)
        torch.testing.assert_close(got, expected[0], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_stand_in(True))
    monkeypatch.setattr(packed_attention, "_GROUPED", {"enable_gqa": True})
    got = packed_attention._varlen(*problem(6, 71, 71)[:3], BOUNDARIES_Q, BOUNDARIES_Q, None, None, causal=False)
    torch.testing.assert_close(got, both_ways)
