"""Causal convolutions for waveforms and their features, whole or as a stream, and the activation between them.

Axis letters: B batch, C channels, T time steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RESIDUAL_GAIN = 0.1
"""What a residual branch begins with, so that a sum of many is not larger than what came."""

StreamingState = dict[torch.nn.Module, Any]
"""What a network remembers of a signal that it sees in pieces: an empty dictionary at its beginning, and from then on
what each module put there. The pieces' outputs, one after another, are the output of the whole."""


class CausalConv1d(torch.nn.Conv1d):
    """A convolution whose output at a step sees no later step; of T steps it makes ceil(T / stride).

    Before the signal, and after it where its length is no multiple of the stride, are zeros; or, with `replicate`, the
    first and the last step over and over.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as ``torch.nn.Conv1d``.
        replicate: see above.
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
        """(B, in_channels, T) -> (B, out_channels, ceil(T / stride)).

        Args:
            state: of a signal in pieces; all but the last are multiples of the stride long.
        """
        missing = -x.shape[-1] % self.stride[0]
        if state is None and not self.replicate and missing <= self.left:
            # Zeros at both ends, which the convolution itself adds, and without what the later ones made.
            y = F.conv1d(x, self.weight, self.bias, self.stride, self.left, self.dilation, self.groups)
            return y[..., : -(-x.shape[-1] // self.stride[0])]
        parts = [x]
        if self.left:
            past = state.get(self) if state is not None else None
            parts.insert(0, self._beyond(x[..., :1], self.left) if past is None else past)
        if missing:
            parts.append(self._beyond(x[..., -1:], missing))
        if len(parts) > 1:  # not F.pad, which goes over the memory twice
            x = torch.cat(parts, dim=-1)
        if state is not None and self.left:
            state[self] = x[..., x.shape[-1] - self.left :]
        return super().forward(x)

    def _beyond(self, nearest: Tensor, steps: int) -> Tensor:
        """What lies before or after the signal, whose nearest step is (B, C, 1)."""
        value = nearest if self.replicate else nearest.new_zeros(())
        return value.expand(*nearest.shape[:-1], steps)


class CausalTransposedConv1d(torch.nn.ConvTranspose1d):
    """A convolution that makes `stride` steps of one, its kernel as long as the stride or twice as long.

    With the longer kernel a step's output reaches into the next step's, and both ends, where there is but one of the
    two, are cut off as in the released Qwen3-Omni: T steps become stride·(T − 1). With the shorter they become
    stride·T.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        if kernel_size not in (stride, 2 * stride):
            raise ValueError(f"kernel_size={kernel_size} is neither stride={stride} nor twice as long")
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.overlap = kernel_size - stride

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """(B, in_channels, T) -> (B, out_channels, stride·T) or, in all pieces together, stride less."""
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
    """Let every convolution of a network begin so that a signal leaves it as large as it came, and biases at 0.

    With torch's own weights a signal shrinks by a factor at each layer. Behind the dozens of a codec it is a trace on
    the constant of the biases, and training finds that constant long before it finds the signal.
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
    """y = x + sin²(e^α·x) / e^β, with an α and a β for each channel, for what repeats in time (Ziyin et al. 2020; the
    form with two parameters is BigVGAN's, Lee et al. 2023).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.zeros(channels))
        self.beta = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) -> (B, C, T)."""
        return _SnakeBeta.apply(x, self.alpha, self.beta)
