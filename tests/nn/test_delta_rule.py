"""The chunked gated delta rule against its definition, one token at a time, and against transformers."""

import pytest
import torch

from omni_train.nn import delta_rule_chunks
from omni_train.nn.delta_rule import causal_conv1d, chunk_gated_delta_rule, install_cpu_kernels, l2norm

ROW = [1, 63, 64, 65, 3, 130, 2, 40]  # boundaries inside chunks, on their edges, and several in one chunk


def recurrence(q, k, v, g, beta, initial_state=None):
    """The definition for one sequence: q, k (T, H, K), v (T, H, V), g, beta (T, H), state (H, K, V)."""
    T, H, K = k.shape
    state = q.new_zeros(H, K, v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        state = state * g[t].exp()[:, None, None]
        error = v[t] - torch.einsum("hk,hkv->hv", k[t], state)
        state = state + torch.einsum("hk,hv->hkv", k[t] * beta[t][:, None], error)
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state) * K**-0.5)
    return torch.stack(outputs), state


def inputs(T, H=2, K=8, V=12, B=1, decay=1.0, dtype=torch.float64, seed=0):
    """q, k, v, g, beta as a layer makes them; each a leaf that wants a gradient."""
    torch.manual_seed(seed)
    q, k = (l2norm(torch.randn(B, T, H, K, dtype=torch.float64)) for _ in range(2))
    v = torch.randn(B, T, H, V, dtype=torch.float64)
    g = -decay * torch.rand(B, T, H, dtype=torch.float64)
    beta = torch.rand(B, T, H, dtype=torch.float64)
    return [
        x.to(torch.promote_types(dtype, torch.float32) if x is g else dtype).requires_grad_()
        for x in (q, k, v, g, beta)
    ]


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def gradients(outputs, leaves, seed=1):
    """Gradients of a random linear function of the outputs."""
    torch.manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    return torch.autograd.grad(loss, leaves)


def assert_all_close(got, expected, rtol=1e-9, atol=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("decay", [0.05, 1.0, 60.0])
def test_values_states_and_gradients_follow_the_definition(T, decay):
    leaves = [*inputs(T, B=2, decay=decay), torch.randn(2, 2, 8, 12, dtype=torch.float64, requires_grad=True)]
    *streams, state = leaves
    got = chunk_gated_delta_rule(*streams, initial_state=state, output_final_state=True)
    rows = [recurrence(*(x[b] for x in streams), state[b]) for b in range(2)]
    expected = [torch.stack(x) for x in zip(*rows, strict=True)]
    assert_all_close(got, expected)
    assert_all_close(gradients(got, leaves), gradients(expected, leaves))


def test_gradients_pass_a_numerical_check_with_boundaries_inside_a_chunk():
    cu_seqlens = cu_seqlens_of([5, 1, 61, 4])

    def packed(*streams):
        return chunk_gated_delta_rule(*streams, cu_seqlens=cu_seqlens)[0]

    assert torch.autograd.gradcheck(packed, inputs(71, H=1, K=2, V=3))


@pytest.mark.parametrize("with_states", [False, True])
def test_packed_sequences_equal_separate_ones(with_states):
    leaves = inputs(sum(ROW))
    separate = [x.split(ROW, dim=1) for x in leaves]
    if with_states:
        states = torch.randn(len(ROW), 2, 8, 12, dtype=torch.float64, requires_grad=True)
        got = chunk_gated_delta_rule(
            *leaves, initial_state=states, output_final_state=True, cu_seqlens=cu_seqlens_of(ROW)
        )
        each = [recurrence(*(x[n][0] for x in separate), states[n]) for n in range(len(ROW))]
        expected = (torch.cat([o for o, _ in each])[None], torch.stack([s for _, s in each]))
        leaves = [*leaves, states]
    else:
        got = chunk_gated_delta_rule(*leaves, cu_seqlens=cu_seqlens_of(ROW))[:1]
        expected = (torch.cat([recurrence(*(x[n][0] for x in separate))[0] for n in range(len(ROW))])[None],)
    assert_all_close(got, expected)
    assert_all_close(gradients(got, leaves), gradients(expected, leaves))


def test_an_empty_sequence_keeps_its_state():
    streams = inputs(70)
    states = torch.randn(3, 2, 8, 12, dtype=torch.float64, requires_grad=True)
    _, final = chunk_gated_delta_rule(
        *streams, initial_state=states, output_final_state=True, cu_seqlens=torch.tensor([0, 30, 30, 70])
    )
    assert torch.equal(final[1], states[1])
    (dstates,) = gradients([final[1]], [states])
    assert dstates[1].abs().min() > 0 and not dstates[[0, 2]].any()


@pytest.mark.parametrize("cut", [1, 64, 77])
def test_a_sequence_continued_from_its_state_equals_the_whole(cut):
    streams = inputs(150)
    whole, last = chunk_gated_delta_rule(*streams, output_final_state=True)
    head, state = chunk_gated_delta_rule(*(x[:, :cut] for x in streams), output_final_state=True)
    tail, end = chunk_gated_delta_rule(*(x[:, cut:] for x in streams), initial_state=state, output_final_state=True)
    assert_all_close((torch.cat((head, tail), 1), end), (whole, last))
    assert_all_close(gradients([torch.cat((head, tail), 1), end], streams), gradients([whole, last], streams))


@pytest.mark.parametrize("cu_seqlens", [None, cu_seqlens_of([100, 33, 167])])
def test_rows_longer_than_a_block_equal_rows_of_one_block(monkeypatch, cu_seqlens):
    streams = inputs(300)
    at_once = chunk_gated_delta_rule(*streams, cu_seqlens=cu_seqlens)[:1]
    expected = gradients(at_once, streams)
    monkeypatch.setattr(delta_rule_chunks, "BLOCK_ROWS", 4 * delta_rule_chunks.CHUNK)  # two chunks of two heads
    in_blocks = chunk_gated_delta_rule(*streams, cu_seqlens=cu_seqlens)[:1]
    assert_all_close(in_blocks, at_once)
    assert_all_close(gradients(in_blocks, streams), expected)


@pytest.mark.parametrize("normalise", [False, True])
def test_one_sequence_equals_transformers(normalise):
    reference = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe").torch_chunk_gated_delta_rule
    options = dict(output_final_state=True, use_qk_l2norm_in_kernel=normalise)
    streams = inputs(201, H=3, K=16, V=24, B=2, dtype=torch.float32, seed=7)
    got, expected = chunk_gated_delta_rule(*streams, **options), reference(*streams, **options)
    assert_all_close(got, expected, rtol=1e-5, atol=2e-6)
    assert_all_close(gradients(got, streams), gradients(expected, streams), rtol=1e-4, atol=1e-5)


def test_fp32_stays_accurate_when_all_keys_are_alike():
    """The hardest case of the triangular inverse: every key reads all that was written before."""
    streams = inputs(256)
    with torch.no_grad():
        streams[1].copy_(streams[1][:, :1].expand_as(streams[1]))
        streams[3].fill_(-1e-3)
        streams[4].fill_(1.0)
    expected, _ = recurrence(*(x[0] for x in streams))
    got, _ = chunk_gated_delta_rule(*(x.float() for x in streams))
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_decay_keeps_its_digits_where_little_outlives_a_token():
    streams = inputs(130)
    with torch.no_grad():
        streams[3].sub_(8)
    exact = gradients([recurrence(*(x[0] for x in streams))[0][None]], [streams[3]])[0]
    narrow = [x.detach().float().requires_grad_() for x in streams]
    got = gradients([chunk_gated_delta_rule(*narrow)[0]], [narrow[3]])[0]
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("decay", [400.0, 5000.0])
def test_strong_decay_neither_overflows_nor_loses_the_state_write(decay):
    streams = inputs(130, decay=decay)
    expected, _ = recurrence(*(x[0] for x in streams))
    narrow = [x.detach().float().requires_grad_() for x in streams]
    got, _ = chunk_gated_delta_rule(*narrow)
    torch.testing.assert_close(got[0].double(), expected, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in gradients([got], narrow))


def test_the_decay_s_gradient_is_accurate_where_little_outlives_a_token():
    q, k, v, g, beta = inputs(130, dtype=torch.float32)
    rounded = (q, k, v, (g.detach() - 8).requires_grad_(), beta)
    exact = [x.detach().double().requires_grad_() for x in rounded]
    dg, dg_exact = (gradients(chunk_gated_delta_rule(*x)[:1], x)[3] for x in (rounded, exact))
    assert (dg - dg_exact).norm() < 1e-4 * dg_exact.norm()


def test_bf16_inputs_are_computed_in_fp32():
    streams = inputs(131, dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in streams]
    got, expected = chunk_gated_delta_rule(*streams)[:1], chunk_gated_delta_rule(*wide)[:1]
    assert got[0].dtype == torch.bfloat16 and torch.equal(got[0], expected[0].bfloat16())
    torch.manual_seed(1)
    weight = torch.randn_like(got[0])
    narrow_gradients = torch.autograd.grad((got[0] * weight).sum(), streams)
    wide_gradients = torch.autograd.grad((expected[0] * weight.float()).sum(), wide)
    for narrow, exact, stream in zip(narrow_gradients, wide_gradients, streams, strict=True):
        assert torch.equal(narrow, exact.to(stream.dtype))


def test_input_that_does_not_fit_is_refused_by_name():
    q, k, v, g, beta = inputs(10)
    with pytest.raises(ValueError, match=r"beta has shape \(1, 9, 2\)"):
        chunk_gated_delta_rule(q, k, v, g, beta[:, 1:])
    with pytest.raises(TypeError, match=r"g is torch\.bfloat16"):
        chunk_gated_delta_rule(q, k, v, g.bfloat16(), beta)
    with pytest.raises(ValueError, match="rise from 0 to the row's 10 tokens"):
        chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="one packed row"):
        chunk_gated_delta_rule(*inputs(10, B=2), cu_seqlens=torch.tensor([0, 10]))


def test_megatron_finds_the_kernels_where_it_looks_for_those_of_fla(monkeypatch):
    from megatron.core.ssm.gated_delta_net import common, gdn

    for module, name in ((common, "HAVE_FLA"), (common, "l2norm"), (gdn, "causal_conv1d")):
        monkeypatch.setattr(module, name, None)
    for module in (common, gdn):
        monkeypatch.setattr(module, "chunk_gated_delta_rule", None)
    install_cpu_kernels()
    assert common.HAVE_FLA and common.l2norm is l2norm and gdn.causal_conv1d is causal_conv1d
    assert common.chunk_gated_delta_rule is gdn.chunk_gated_delta_rule is chunk_gated_delta_rule


def test_l2norm_scales_to_unit_length_and_passes_a_numerical_check():
    torch.manual_seed(3)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(l2norm(x).norm(dim=-1), torch.ones(3, 5, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(lambda x: l2norm(x, dim=1, eps=0.1), x)
