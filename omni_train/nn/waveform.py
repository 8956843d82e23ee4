"""Causal convolutions for waveforms and their features, whole or streaming, and the SnakeBeta activation.

Axis letters: B batch, C channels, T time steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RESIDUAL_GAIN = 0.1
"""Initial scale of a residual branch, so that a sum of many is not larger than the input."""

StreamingState = dict[torch.nn.Module, Any]
"""State of a network over a signal that comes in pieces: pass an empty dictionary with the first, the same one with the
others. Convolutions keep their left context there, attention its KV cache. The outputs of the pieces, one after
another, are the output of the whole."""


class CausalConv1d(torch.nn.Conv1d):
    """Causal convolution: T steps become ceil(T / stride), none of which depends on later input steps.

    The signal is padded before, and where its length is no multiple of the stride after it, with zeros, or with its
    first and last step (`replicate`).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as ``torch.nn.Conv1d``.
        replicate: whether to pad with the first and last step.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        replicate: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias
        )
        self.left = (kernel_size - 1) * dilation + 1 - stride
        self.replicate = replicate

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Convolve, (B, in_channels, T) -> (B, out_channels, ceil(T / stride)).

        Args:
            x: signal, or a piece of it.
            state: streaming state, where the signal comes in pieces; all but the last are multiples of the stride long.
        """
        missing = -x.shape[-1] % self.stride[0]
        if state is None and not self.replicate and missing <= self.left:
            # torch pads both ends with zeros; the outputs that the right ones add are dropped.
            y = F.conv1d(x, self.weight, self.bias, self.stride, self.left, self.dilation, self.groups)
            return y[..., : -(-x.shape[-1] // self.stride[0])]
        parts = [x]
        if self.left:
            context = state.get(self) if state is not None else None
            parts.insert(0, self._padding(x[..., :1], self.left) if context is None else context)
        if missing:
            parts.append(self._padding(x[..., -1:], missing))
        if len(parts) > 1:  # not F.pad, which goes over the memory twice
            x = torch.cat(parts, dim=-1)
        if state is not None and self.left:
            state[self] = x[..., x.shape[-1] - self.left :]
        return super().forward(x)

    def _padding(self, nearest: Tensor, steps: int) -> Tensor:
        """Padding (B, C, steps) beside the end of a signal whose outermost step is (B, C, 1)."""
        value = nearest if self.replicate else nearest.new_zeros(())
        return value.expand(*nearest.shape[:-1], steps)


class CausalTransposedConv1d(torch.nn.ConvTranspose1d):
    """Transposed convolution that upsamples by `stride`, its kernel as long as the stride or twice as long.

    With the longer kernel outputs of neighbouring steps overlap, and both ends, where nothing overlaps, are cut off as
    in the released Qwen3-Omni: T steps become stride·(T − 1). With the shorter they become stride·T.

    Args:
        in_channels, out_channels: C of input and output.
        kernel_size: stride or 2·stride.
        stride: output steps of each input step.

    Raises:
        ValueError: another kernel size.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        if kernel_size not in (stride, 2 * stride):
            raise ValueError(f"kernel_size={kernel_size}: must be stride={stride} or twice that")
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.overlap = kernel_size - stride

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Upsample, (B, in_channels, T) -> (B, out_channels, stride·T), less stride steps with the longer kernel.

        Args:
            x: signal, or a piece of it.
            state: streaming state, where the signal comes in pieces; only the first is then shorter.
        """
        if not self.overlap:
            return super().forward(x)
        if state is not None:
            if self in state:
                x = torch.cat([state[self], x], dim=-1)
            state[self] = x[..., -1:]
        y = super().forward(x)
        return y[..., self.overlap : y.shape[-1] - self.overlap]


@torch.no_grad()
def variance_preserving_init(network: torch.nn.Module) -> None:
    """Initialise every convolution of a network so that it preserves the variance of a signal, with biases at 0.

    With torch's own initialisation a signal shrinks by a factor at each layer. After the dozens of layers of a codec it
    vanishes beside the constant of the biases, and training finds that constant long before it finds the signal.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            summed = module.in_channels // module.groups * module.kernel_size[0]
            if isinstance(module, torch.nn.ConvTranspose1d):
                summed /= module.stride[0]
            torch.nn.init.normal_(module.weight, std=summed**-0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


class _SnakeBeta(torch.autograd.Function):
    """Written out because autograd would keep four tensors of the input's size and go over memory twice as often."""

    @staticmethod
    def forward(ctx, x, alpha, beta):
        frequency, height = _snake_factors(alpha, beta)
        ctx.save_for_backward(x, alpha, beta)
        return (x * frequency).sin_().square_().mul_(height).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, alpha, beta = ctx.saved_tensors
        frequency, height = _snake_factors(alpha, beta)
        slope = 2 * frequency * height
        angle = x * frequency
        cosine = angle.cos()
        sine = angle.sin_()
        weighted = grad * sine
        # d height / d beta = −e^beta · height²
        grad_height = torch.linalg.vecdot(weighted, sine).sum(0)
        grad_beta = -grad_height * beta.exp() * height[:, 0].square()
        weighted.mul_(cosine)
        grad_alpha = torch.linalg.vecdot(weighted, x).sum(0) * slope[:, 0]
        return weighted.mul_(slope).add_(grad), grad_alpha, grad_beta


def _snake_factors(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    return alpha.exp()[:, None], (1.0 / (beta.exp() + 1e-9))[:, None]


class SnakeBeta(torch.nn.Module):
    """SnakeBeta activation y = x + sin²(e^α·x) / e^β, with an α and a β for each channel, for periodic signals.

    Snake is of Ziyin et al. 2020, section 3; the form with two parameters is BigVGAN's (Lee et al. 2023).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.zeros(channels))
        self.beta = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Activation, (B, C, T) -> (B, C, T)."""
        return _SnakeBeta.apply(x, self.alpha, self.beta)
