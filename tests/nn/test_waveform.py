"""Convolutions over waveforms: what they see, in streams too, and the activation's gradient."""

import pytest
import torch
import torch.nn.functional as F

from omni_train.nn.waveform import CausalConv1d, CausalTransposedConv1d, SnakeBeta


def signal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (3, 1, 4), (1, 1, 1), (8, 4, 1), (3, 2, 1)])
def test_a_causal_convolution_is_one_over_the_signal_set_forth(kernel, stride, dilation, replicate):
    conv = CausalConv1d(3, 5, kernel, stride=stride, dilation=dilation, replicate=replicate)
    mode = "replicate" if replicate else "constant"
    for length in (1, 2, 11, 12):
        x = signal(2, 3, length)
        padded = F.pad(x, ((kernel - 1) * dilation + 1 - stride, -length % stride), mode=mode)
        y = conv(x)
        assert y.shape == (2, 5, -(-length // stride))
        torch.testing.assert_close(y, F.conv1d(padded, conv.weight, conv.bias, stride, 0, dilation))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(12, 1), (4, 4, 5), (4, 8, 1), (13,)])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(7, 1, 1), (3, 1, 9), (8, 4, 1)])
def test_a_causal_convolution_of_a_stream(pieces, kernel, stride, dilation):
    for replicate in (False, True):
        conv, stream = CausalConv1d(3, 5, kernel, stride=stride, dilation=dilation, replicate=replicate), {}
        x = signal(2, 3, 13)
        y = torch.cat([conv(piece, stream) for piece in x.split(pieces, dim=-1)], dim=-1)
        torch.testing.assert_close(y, conv(x))


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride"), [(10, 5), (3, 3)])
def test_a_transposed_convolution_whole_and_of_a_stream(kernel, stride):
    conv, stream = CausalTransposedConv1d(3, 5, kernel, stride), {}
    x = signal(2, 3, 9)
    y = conv(x)
    cut = kernel - stride
    torch.testing.assert_close(y, F.conv_transpose1d(x, conv.weight, conv.bias, stride)[..., cut : 9 * stride])
    torch.testing.assert_close(torch.cat([conv(piece, stream) for piece in x.split((1, 5, 3), dim=-1)], dim=-1), y)


def test_another_kernel_than_one_or_two_strides_is_refused():
    with pytest.raises(ValueError, match="kernel_size=7: must be stride=5 or twice that"):
        CausalTransposedConv1d(1, 1, 7, 5)


def test_the_activation_and_its_gradients():
    snake = SnakeBeta(4).double()
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.0, -0.7, 0.4, 1.1]))
        snake.beta.copy_(torch.tensor([0.0, 0.5, -0.8, 0.2]))
    x = signal(2, 4, 7).double().requires_grad_()
    inputs = (x, snake.alpha, snake.beta)
    expected = x + (snake.alpha.exp()[:, None] * x).sin() ** 2 / snake.beta.exp()[:, None]
    torch.testing.assert_close(snake(x), expected)
    weight = signal(2, 4, 7).double()
    have = torch.autograd.grad((snake(x) * weight).sum(), inputs)
    want = torch.autograd.grad((expected * weight).sum(), inputs)
    for ours, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(ours, theirs)
