"""One kernel of flash-linear-attention in plain torch, for the Tritons that compile it wrongly.

From Triton 3.4 until 3.7.1, on Hopper GPUs, the kernel behind ``chunk_bwd_dqkwg`` gives wrong gradients of the gated
delta rule, and flash-linear-attention refuses to run it (its issue 640). PyTorch up to 2.11 comes with such a Triton.
All the other kernels are right there, so this one alone is replaced: everything in it is local to a chunk.

Axis letters: B batch, T tokens, C tokens of a chunk, N chunks, H heads, K and V head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNKS_AT_ONCE = 128
"""Chunks computed at once, which bounds the fp32 copies of their tensors."""


def chunk_bwd_dqkwg(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    w: Tensor | None = None,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    dv: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w and g, with arguments and results of flash-linear-attention's function of this name.

    Args:
        q, k, w: (B, T, H, K).
        v, do, dv: (B, T, H, V).
        h, dh: (B, N, H, K, V) state before each chunk, and its gradient; over packed sequences N counts all chunks.
        g: (B, T, H) sum of the log2 of the decays since the beginning of the chunk.
        scale: factor on the output of the forward pass.
        cu_seqlens: (sequences+1,) boundaries in the one row.
        chunk_indices: (N, 2) each chunk's sequence, and its number in it.

    Returns:
        dq, dk, dw in the types of q, k and w, and dg (B, T, H) in fp32.

    Raises:
        NotImplementedError: arguments that the gated delta rule does not use.
    """
    if g is None or w is None or g_gamma is not None or state_v_first or q.shape[2] != v.shape[2]:
        raise NotImplementedError(
            "chunk_bwd_dqkwg in plain torch: arguments must be those of the gated delta rule, as many heads in q as v"
        )
    B, T, H, K = k.shape
    steps = torch.arange(chunk_size, device=k.device)
    if cu_seqlens is None:
        starts = torch.arange(0, T, chunk_size, device=k.device)
        ends = torch.full_like(starts, T)
        rows = [slice(b, b + 1) for b in range(B)]
    else:
        bounds, (sequence, number) = cu_seqlens.long(), chunk_indices.long().unbind(1)
        starts, ends = bounds[sequence] + number * chunk_size, bounds[sequence + 1]
        rows = [slice(0, 1)]
    index_NC = starts[:, None] + steps
    real_NC = index_NC < ends[:, None]
    # Steps past a sequence's end read the last token, count nothing, and are written past the last.
    index_NC = torch.where(real_NC, index_NC, T)
    results = [x.new_zeros(B, T + 1, *x.shape[2:]) for x in (q, k, w)]
    results.append(torch.zeros(B, T + 1, H, dtype=torch.float32, device=g.device))
    for row in rows:
        for part in range(0, len(starts), CHUNKS_AT_ONCE):
            chosen = slice(part, part + CHUNKS_AT_ONCE)
            index, real = index_NC[chosen], real_NC[chosen]
            inputs = [_chunked(x[row][0], index, real) for x in (q, k, v, do, dv)]
            states = [x[row][0, chosen].float() for x in (h, dh)]
            made = _gradients(*inputs, _chunked(g[row][0, :, :, None], index, real)[..., 0], *states, real, scale)
            for result, gradient in zip(results, made, strict=True):
                result[row][0][index] = gradient.transpose(1, 2).to(result.dtype)
    return tuple(result[:, :T].contiguous() for result in results)


def _chunked(x: Tensor, index_NC: Tensor, real_NC: Tensor) -> Tensor:
    """Tokens by chunk, (T, H, D) -> (N, H, C, D) fp32, zeros past a sequence's end."""
    return (x[index_NC.clamp(max=len(x) - 1)] * real_NC[..., None, None]).transpose(1, 2).float()


def _gradients(q, k, v, do, dv, g, h, dh, real_NC, scale):
    """Gradients dq, dk, dw (N, H, C, K) and dg (N, H, C) of a group of chunks."""
    last_N11 = (real_NC.sum(1) - 1)[:, None, None].expand(*g.shape[:2], 1)
    g_last = g.gather(2, last_N11)
    dq = (do @ h.mT) * g.exp2()[..., None] * scale
    dk = (v @ dh.mT) * ((g_last - g).exp2() * real_NC[:, None])[..., None]
    dw = -(dv @ h.mT)
    # What the decay of a whole chunk does: to the state that passes through it, and to what its tokens add.
    whole = (h * dh).sum((-1, -2))[..., None] * g_last.exp2() + (dk * k).sum((-1, -2))[..., None]
    decay_CC = (g[..., :, None] - g[..., None, :]).exp2()
    # Behind the end too: what is decayed by more than fp32 holds would be 0 · ∞ there.
    mask = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril() & real_NC[:, None, :, None]
    ds = torch.where(mask, (do @ v.mT) * decay_CC, 0.0) * scale
    dq, dk = dq + ds @ k, dk + ds.mT @ q
    dg = (dq * q).sum(-1) - (dk * k).sum(-1)
    return dq, dk, dw, dg.scatter_add(2, last_N11, whole)
