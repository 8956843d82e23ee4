"""Functions of flash-linear-attention for Gated DeltaNet in plain torch, for machines without its kernels.

Axis letters: B batch, T tokens, H heads, K and V head dimensions, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omni_train.nn.causal_conv import causal_conv1d, check_boundaries
from omni_train.nn.delta_rule_chunks import CHUNK, GatedDeltaRule, Layout, compute_dtype


def install_cpu_kernels() -> None:
    """Let Megatron's Gated DeltaNet call these functions instead of flash-linear-attention's. Idempotent."""
    from megatron.core.ssm.gated_delta_net import common, gdn

    for module in (common, gdn):
        module.causal_conv1d = causal_conv1d
        module.chunk_gated_delta_rule = chunk_gated_delta_rule
    common.l2norm = l2norm
    common.HAVE_FLA = True


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule with the arguments and results of flash-linear-attention's function of this name.

    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        g: (B, T, H), the log of the decay, ≤ 0, in fp32 (or fp64): its sums must not be rounded to bf16.
        beta: (B, T, H), the strength of each write.
        scale: factor on the output; K^-½ by default.
        initial_state: (N, H, K, V); zeros by default. N is the number of sequences: B, or those of ``cu_seqlens``.
        output_final_state: return the state after each sequence too.
        use_qk_l2norm_in_kernel: apply :func:`l2norm` to q and k first.
        cu_seqlens: (N+1,) boundaries of the sequences packed in the one row (B = 1); the state starts anew at each.

    Returns:
        The output (B, T, H, V) in q's type, and the final state (N, H, K, V), fp32, or None. Arithmetic is fp32 (fp64
        for fp64 inputs).

    Raises:
        ValueError: shapes or boundaries that do not fit together.
        TypeError: g narrower than fp32.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    for name, tensor, shape in (
        ("q", q, (B, T, H, K)),
        ("v", v, (B, T, H, V)),
        ("g", g, (B, T, H)),
        ("beta", beta, (B, T, H)),
        ("initial_state", initial_state, (N, H, K, V)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"gated delta rule: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if g.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gated delta rule: g is {g.dtype}; compute the log decay in torch.float32")

    dtype = compute_dtype(q)
    scale = K**-0.5 if scale is None else scale
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    state = q.new_zeros(N, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)

    inputs = (q, k, v, g, beta)
    if cu_seqlens is None:
        chunks = -(-T // CHUNK)
        whole_row = Layout(begins={0: 0}, ends={chunks - 1: 0})
        output, final = GatedDeltaRule.apply(*inputs, state.view(1, B * H, K, V), scale, whole_row)
        final = final.view(N, H, K, V)
    elif initial_state is None and not output_final_state:
        check_boundaries(cu_seqlens, B, T)
        packed = Layout(begins={0: 0}, ends={}, sequence=_sequence_of_token(cu_seqlens, T))
        output, final = GatedDeltaRule.apply(*inputs, state[:1], scale, packed)
    else:
        # A sequence with a state of its own starts and ends on the edges of chunks.
        check_boundaries(cu_seqlens, B, T)
        lengths = cu_seqlens.diff().long()
        chunks_N = -(-lengths // CHUNK)
        last_N = chunks_N.cumsum(0) - 1
        first_N = last_N + 1 - chunks_N
        filled = [n for n in range(N) if lengths[n] > 0]
        aligned = Layout(
            begins={int(first_N[n]): n for n in filled},
            ends={int(last_N[n]): n for n in filled},
        )
        shift_N = first_N * CHUNK - cu_seqlens[:-1]
        where_T = torch.arange(T, device=k.device) + shift_N.repeat_interleave(lengths)
        spread = (x.new_zeros(1, int(chunks_N.sum()) * CHUNK, *x.shape[2:]).index_copy(1, where_T, x) for x in inputs)
        output, final = GatedDeltaRule.apply(*spread, state, scale, aligned)
        output = output.index_select(1, where_T)
    return output, final if output_final_state else None


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Gated delta rule for one more token of each sequence, on any device.

    Args:
        q, k: (N, H, K).
        v: (N, H, V).
        g: (N, H), the log of the decay.
        beta: (N, H), the strength of the write.
        state: (N, H, K, V) before the token.

    Returns:
        The output (N, H, V) in q's type, and the state after the token. Arithmetic is in the state's type.
    """
    wide_q, k, v, g, beta = (x.to(state.dtype) for x in (q, k, v, g, beta))
    state = state * g.exp()[..., None, None]
    written = (v - torch.einsum("nhk,nhkv->nhv", k, state)) * beta[..., None]
    state = state + k[..., None] * written[..., None, :]
    return (torch.einsum("nhk,nhkv->nhv", wide_q, state) * k.shape[-1] ** -0.5).to(q.dtype), state


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, eps: float) -> Tensor:
        wide = x.to(compute_dtype(x))
        rstd = wide.square().sum(dim, keepdim=True).add_(eps).rsqrt_()
        y = wide * rstd
        ctx.save_for_backward(y, rstd)
        ctx.dim, ctx.dtype = dim, x.dtype
        return y if y.dtype == x.dtype else y.to(x.dtype)  # as in `omni_train.nn.norm`: torch 2.11's compiler

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        y, rstd = ctx.saved_tensors
        dy = dy.to(y.dtype)
        along = (dy * y).sum(ctx.dim, keepdim=True)
        return torch.addcmul(dy, y, along, value=-1).mul_(rstd).to(ctx.dtype), None, None


def l2norm(x: Tensor, dim: int = -1, eps: float = 1e-6) -> Tensor:
    """L2 normalisation ``x / sqrt(sum(x²) + eps)`` over ``dim``, computed in at least fp32, returned in x's type."""
    return _L2Norm.apply(x, dim, eps)


def _sequence_of_token(cu_seqlens: Tensor, T: int) -> Tensor:
    return torch.searchsorted(cu_seqlens[1:].long(), torch.arange(T, device=cu_seqlens.device), right=True)
