"""The causal convolution against torch's own, one sequence at a time."""

import pytest
import torch
import torch.nn.functional as F

from omni_train.nn import causal_conv
from omni_train.nn.causal_conv import causal_conv1d

ROW = [1, 2, 3, 4, 50, 0, 7]  # shorter than, as long as and longer than the kernel, and an empty one


def reference(x_TD, weight, bias, activation, state_DW):
    """One sequence behind its last inputs, in torch's own convolution."""
    D, W = weight.shape
    padded = torch.cat((state_DW[:, 1:], x_TD.T), dim=1)
    y = F.conv1d(padded[None], weight[:, None], bias, groups=D)[0].T if len(x_TD) else x_TD
    state = torch.cat((state_DW, x_TD.T), dim=1)[:, -W:]
    return (F.silu(y) if activation else y), state


def tensors(T, D=5, W=4, N=1, B=1, dtype=torch.float64):
    torch.manual_seed(T)
    shapes = dict(x=(B, T, D), weight=(D, W), bias=(D,), initial_state=(N, D, W))
    return {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}


def gradients(outputs, leaves):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in outputs), leaves)


def assert_all_close(got, expected, rtol=1e-9, atol=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("block", [15, 1 << 18])
def test_packed_sequences_equal_separate_ones(monkeypatch, activation, W, block):
    monkeypatch.setattr(causal_conv, "BLOCK", block)  # 15 elements: 3 tokens of 5 channels
    given = tensors(sum(ROW), W=W, N=len(ROW))
    cu_seqlens = torch.tensor([0, *ROW]).cumsum(0).to(torch.int32)
    got = causal_conv1d(**given, activation=activation, output_final_state=True, cu_seqlens=cu_seqlens)
    each = [
        reference(x, given["weight"], given["bias"], activation, state)
        for x, state in zip(given["x"][0].split(ROW), given["initial_state"], strict=True)
    ]
    expected = torch.cat([y for y, _ in each])[None], torch.stack([state for _, state in each])
    leaves = list(given.values())
    assert_all_close(got, expected)
    assert_all_close(gradients(got, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("T", [1, 3, 130])
def test_rows_of_a_batch_start_from_nothing(T):
    given = tensors(T, B=2)
    del given["initial_state"]
    got, state = causal_conv1d(**given, activation="swish")
    nothing = torch.zeros_like(given["weight"])
    expected = torch.stack([reference(x, given["weight"], given["bias"], "silu", nothing)[0] for x in given["x"]])
    leaves = list(given.values())
    assert state is None
    assert_all_close([got], [expected])
    assert_all_close(gradients([got], leaves), gradients([expected], leaves))


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_sequence_continued_from_its_state_equals_the_whole(cut):
    given = tensors(13)
    x = given.pop("x")
    whole, end = causal_conv1d(x, **given, output_final_state=True)
    head, given["initial_state"] = causal_conv1d(x[:, :cut], **given, output_final_state=True)
    tail, last = causal_conv1d(x[:, cut:], **given, output_final_state=True)
    assert_all_close((torch.cat((head, tail), 1), last), (whole, end))


def test_no_token_sees_the_sequence_before_even_when_that_is_not_finite():
    given = tensors(20)
    x, weight = given["x"].detach(), given["weight"].detach()
    x[:, :8] = torch.inf
    packed, _ = causal_conv1d(x, weight, activation="silu", cu_seqlens=torch.tensor([0, 8, 20]))
    assert_all_close([packed[:, 8:]], [causal_conv1d(x[:, 8:], weight, activation="silu")[0]])


def test_bf16_is_computed_in_fp32():
    given = tensors(37, dtype=torch.bfloat16)
    wide = {name: x.detach().float() for name, x in given.items()}
    got, _ = causal_conv1d(**given, activation="silu")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, causal_conv1d(**wide, activation="silu")[0].bfloat16())
    assert [x.dtype for x in gradients([got], list(given.values()))] == [torch.bfloat16] * 4


def test_input_that_does_not_fit_is_refused_by_name():
    given = tensors(10)
    with pytest.raises(ValueError, match="activation 'gelu'"):
        causal_conv1d(given["x"], given["weight"], activation="gelu")
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        causal_conv1d(given["x"], given["weight"], given["bias"][1:])
    with pytest.raises(ValueError, match="rise from 0 to the row's 10 tokens"):
        causal_conv1d(given["x"], given["weight"], cu_seqlens=torch.tensor([0, 11]))
