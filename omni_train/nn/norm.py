"""Root-mean-square normalisation (Zhang & Sennrich 2019), plain and zero-centred, and LayerNorm, in any layout.

Megatron's own torch norm refuses sequence parallelism. All it takes is to mark the weight: it is replicated over the
tensor-parallel ranks, each of which sees only some tokens (or, on queries and keys, some heads), so Megatron sums the
gradients of parameters marked ``sequence_parallel`` over those ranks.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from omni_train import platform


class _Normalize(torch.autograd.Function):
    """y = x̂·(weight + offset), x̂ = x / rms(x) over the last axis, all in fp32.

    Written out because on the CPU it takes half the time of ``F.rms_norm``, and because it keeps nothing but the input
    and one number per row for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, offset, eps):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse_rms = rms.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.offset = offset
        # Neither in place nor a cast to the type it has: on a GPU Megatron compiles what this is a part of, and torch
        # 2.11's compiler gives the result of either no gradient.
        normed = (x * inverse_rms) * (weight.float() + offset)
        return normed if normed.dtype == x.dtype else normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        scale = weight.float() + ctx.offset
        normed, grad = x * inverse_rms, grad.float()
        product = grad * normed
        grad_weight = product.flatten(end_dim=-2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # x̂ does not change along x, so that part of the gradient is taken out.
        along = (product @ scale).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * scale).addcmul_(normed, along, value=-1.0).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight, None, None


class RMSNorm(torch.nn.Module):
    """RMSNorm: y = x̂·w over the last axis, w starting at 1. Statistics in fp32, output in the input's dtype.

    Args:
        config: Megatron's ``TransformerConfig``; gives the weight's dtype and whether sequence parallelism is on.
        hidden_size: length of the last axis.
        eps: added to the mean square.
    """

    offset = 0.0
    """Constant added to the weight, which starts at 1 − offset."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype, device=platform.device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, (…, hidden_size) -> the same shape and dtype."""
        return _Normalize.apply(x, self.weight, self.offset, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ZeroCentredRMSNorm(RMSNorm):
    """Zero-centred RMSNorm (Qwen3.5): y = x̂·(1 + w), w starting at 0: weight decay pulls towards the identity."""

    offset = 1.0


def model_norm(config, hidden_size: int, eps: float = 1e-6) -> RMSNorm:
    """Norm of a model's layers: zero-centred where its configuration says ``layernorm_zero_centered_gamma``."""
    kind = ZeroCentredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
    return kind(config, hidden_size, eps)


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm for encoders (Ba et al. 2016): y = (x − mean) / std · w + b over the last axis.

    Args:
        config: Megatron's ``TransformerConfig``; gives the dtype and whether sequence parallelism is on.
        hidden_size: length of the last axis.
        eps: added to the variance.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=platform.device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel
