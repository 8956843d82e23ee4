"""Our norms are transformers' norms, and keep the memory and dtype that they promise."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm

from omni_train.nn.norm import LayerNorm, RMSNorm, ZeroCentredRMSNorm


def config(dtype=torch.float32, sequence_parallel=False):
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)


def run(norm, x, grad):
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(grad)
    return out.detach(), x.grad, norm.weight.grad


@pytest.mark.parametrize("shape", [(7, 48), (5, 1, 3, 33)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_zero_centred_norm_and_its_gradients_are_those_of_transformers(shape, dtype, tolerance):
    torch.manual_seed(31)
    ours = ZeroCentredRMSNorm(config=config(dtype), hidden_size=shape[-1], eps=1e-3)
    reference = Qwen3_5MoeRMSNorm(shape[-1], eps=1e-3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    ours.weight.data.copy_(weight)
    reference.weight.data.copy_(weight)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    torch.testing.assert_close(run(ours, x, grad), run(reference, x, grad), rtol=tolerance, atol=tolerance)


def test_plain_norm_is_torchs():
    torch.manual_seed(32)
    ours, reference = RMSNorm(config=config(), hidden_size=21, eps=1e-5), torch.nn.RMSNorm(21, eps=1e-5)
    torch.testing.assert_close(ours.weight, reference.weight)
    x, grad = torch.randn(9, 21), torch.randn(9, 21)
    torch.testing.assert_close(run(ours, x, grad), run(reference, x, grad))


def test_gradients_equal_those_in_double_precision():
    torch.manual_seed(33)
    norm = ZeroCentredRMSNorm(config=config(), hidden_size=6, eps=1e-2)
    norm.weight.data.normal_()
    x, grad = torch.randn(3, 6), torch.randn(3, 6)
    _, grad_x, grad_weight = run(norm, x, grad)

    def plain(x, weight):
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-2) * (1 + weight) * grad.double()).sum()

    x, weight = x.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    plain(x, weight).backward()
    torch.testing.assert_close(grad_x.double(), x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_weight.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_a_norm_at_its_start_is_the_identity_on_normalised_input():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    for kind in (RMSNorm, ZeroCentredRMSNorm):
        torch.testing.assert_close(kind(config=config(), hidden_size=4, eps=0.0)(x), x)


def test_a_frozen_weight_gets_no_gradient_but_the_input_does():
    norm = ZeroCentredRMSNorm(config=config(), hidden_size=5)
    norm.weight.requires_grad_(False)
    _, grad_x, grad_weight = run(norm, torch.randn(4, 5), torch.randn(4, 5))
    assert grad_x.abs().sum() > 0 and grad_weight is None


def test_a_row_of_zeros_stays_finite():
    out, grad_x, _ = run(RMSNorm(config=config(), hidden_size=5), torch.zeros(2, 5), torch.ones(2, 5))
    assert (out == 0).all() and grad_x.isfinite().all()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_is_marked_for_summing_over_tensor_parallel_ranks(sequence_parallel):
    norm = RMSNorm(config=config(sequence_parallel=sequence_parallel), hidden_size=5)
    assert norm.weight.sequence_parallel is sequence_parallel


def test_layer_norm_is_torchs_and_marked_like_the_others():
    torch.manual_seed(34)
    ours, reference = LayerNorm(config=config(), hidden_size=21, eps=1e-3), torch.nn.LayerNorm(21, eps=1e-3)
    for parameter, other in zip(ours.parameters(), reference.parameters(), strict=True):
        other.data.copy_(parameter.data.add_(torch.randn(21)))
    x, grad = torch.randn(9, 21), torch.randn(9, 21)
    torch.testing.assert_close(run(ours, x, grad), run(reference, x, grad))
    torch.testing.assert_close(ours.bias.grad, reference.bias.grad)
    for sequence_parallel in (False, True):
        marked = LayerNorm(config=config(sequence_parallel=sequence_parallel), hidden_size=5)
        assert marked.weight.sequence_parallel is marked.bias.sequence_parallel is sequence_parallel
