"""Depthwise causal convolution over packed rows on CPU, forward and backward written out by hand.

Axis letters: B batch, T tokens, D channels, W taps, N sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 18
"""Elements of a block, so that all taps read it from cache."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution with the arguments and results of flash-linear-attention's function of this name.

    ``y[t] = activation(bias + Σ_w weight[:, w] · x[t − W + 1 + w])``, where tokens before a sequence's first come from
    its state, or are zero.

    Args:
        x: (B, T, D).
        weight: (D, W).
        bias: (D,).
        activation: ``"silu"`` (or its other name ``"swish"``), or None.
        initial_state: (N, D, W), the last W inputs before each sequence, oldest first.
        output_final_state: return the last W inputs of each sequence too.
        cu_seqlens: (N+1,) boundaries of the sequences packed in the one row (B = 1).

    Returns:
        The output (B, T, D), and the final state (N, D, W) or None, both in x's type. Arithmetic is fp32 (fp64 for
        fp64 inputs).

    Raises:
        ValueError: an unknown activation, or shapes or boundaries that do not fit together.
    """
    B, T, D = x.shape
    W = weight.shape[1]
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal convolution: activation {activation!r} is not silu, swish or None")
    if cu_seqlens is None:
        cu_seqlens = torch.arange(B + 1, device=x.device) * T
    else:
        check_boundaries(cu_seqlens, B, T)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    N = len(starts)
    for name, tensor, shape in (
        ("weight", weight, (D, W)),
        ("bias", bias, (D,)),
        ("initial_state", initial_state, (N, D, W)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"causal convolution: {name} has shape {tuple(tensor.shape)}, expected {shape}")

    row = x.reshape(B * T, D)
    state_NWD = x.new_zeros(N, W, D) if initial_state is None else initial_state.to(x.dtype).transpose(1, 2)
    alone = W == 1 or (N == 1 and initial_state is None)  # no output sees a state
    y = _CausalConv1d.apply(row, weight, bias, None if alone else state_NWD, starts, lengths, activation is not None)
    y = y.view(B, T, D)
    if not output_final_state:
        return y, None
    # The last W of a sequence's state followed by its tokens.
    position_NW = lengths[:, None] + torch.arange(W, device=x.device)
    from_state = torch.take_along_dim(state_NWD, position_NW.clamp(max=W - 1)[..., None], dim=1)
    from_row = row[(starts[:, None] + position_NW - W).clamp(min=0)]
    return y, torch.where((position_NW < W)[..., None], from_state, from_row).transpose(1, 2)


def check_boundaries(cu_seqlens: Tensor, B: int, T: int) -> None:
    """Check that ``cu_seqlens`` cuts one row of T tokens into sequences.

    Args:
        cu_seqlens: (N+1,) boundaries.
        B: rows of the batch.
        T: tokens of a row.

    Raises:
        ValueError: there are several rows, or the boundaries do not rise from 0 to T.
    """
    if B != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, got {B}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the row's {T} tokens, got {cu_seqlens.tolist()}")


class _CausalConv1d(torch.autograd.Function):
    """Convolves the row as one sequence, then the first W − 1 tokens of each sequence again, behind its own state.

    What comes before the activation is computed again in backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, state_NWD, starts, lengths, silu: bool) -> Tensor:
        taps, offset = _wide(weight, bias)
        y = _forward(x, taps, offset, silu)
        if state_NWD is not None:
            windows, head_NW, inside_NW = _heads(x, state_NWD, starts, lengths)
            heads = _forward(windows.flatten(0, 1), taps, offset, silu).view_as(windows)
            y[head_NW[inside_NW]] = heads[:, 1 - len(taps) :][inside_NW]
        ctx.save_for_backward(x, weight, bias, state_NWD, starts, lengths)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, bias, state_NWD, starts, lengths = ctx.saved_tensors
        taps, offset = _wide(weight, bias)
        if state_NWD is None:
            dx, dtaps, doffset = _backward(x, dy, taps, offset, ctx.silu)
            dstate = None
        else:
            windows, head_NW, inside_NW = _heads(x, state_NWD, starts, lengths)
            head = head_NW[inside_NW]
            counts = torch.ones(len(x), 1, dtype=taps.dtype, device=x.device).index_fill_(0, head, 0)
            dx, dtaps, doffset = _backward(x, dy, taps, offset, ctx.silu, counts)
            dheads = torch.zeros_like(windows)
            dheads[:, 1 - len(taps) :][inside_NW] = dy[head]
            more = _backward(windows.flatten(0, 1), dheads.flatten(0, 1), taps, offset, ctx.silu)
            dwindows = more[0].view_as(windows)
            dx.index_add_(0, head, dwindows[:, 1 - len(taps) :][inside_NW])
            dtaps += more[1]
            doffset += more[2]
            dstate = torch.zeros_like(state_NWD)
            dstate[:, 1:] = dwindows[:, : len(taps) - 1]
        dbias = None if bias is None else doffset.to(bias.dtype)
        return dx.to(x.dtype), dtaps.T.to(weight.dtype), dbias, dstate, None, None, None


def _heads(x: Tensor, state_NWD: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of the first W − 1 tokens of each sequence.

    Returns:
        (N, 2(W − 1), D) inputs of those tokens, (N, W − 1) their indices in the row, and (N, W − 1) bool, which of them
        the sequence has.
    """
    offset = torch.arange(state_NWD.shape[1] - 1, device=x.device)
    inside_NW = offset < lengths[:, None]
    head_NW = torch.where(inside_NW, starts[:, None] + offset, 0)
    return torch.cat((state_NWD[:, 1:], x[head_NW]), dim=1), head_NW, inside_NW


def _forward(x: Tensor, taps: Tensor, offset: Tensor | None, silu: bool) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start, stop in _blocks(x):
        z, _ = _convolve(x, taps, offset, start, stop)
        y[start:stop] = F.silu(z, inplace=True) if silu else z
    return y


def _backward(x, dy, taps, offset, silu: bool, counts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, taps and offset, in the type of `taps`; `counts` (T, 1) is 0 for outputs to leave out, else 1."""
    W = len(taps)
    dx = torch.zeros(x.shape, dtype=taps.dtype, device=x.device)
    dtaps, doffset = torch.zeros_like(taps), torch.zeros_like(taps[0])
    for start, stop in _blocks(x):
        z, window = _convolve(x, taps, offset, start, stop)
        dz = dy[start:stop].to(taps.dtype)
        if silu:
            dz = torch.ops.aten.silu_backward(dz, z)
        if counts is not None:
            dz = dz * counts[start:stop]
        if offset is not None:
            doffset += dz.sum(0)
        for back in range(min(W, len(window))):
            skip = max(0, back - start)  # outputs whose input lies before the row
            read = slice(start + skip - back, stop - back)
            seen = window[skip - back + min(start, W - 1) : len(window) - back]
            dtaps[W - 1 - back] += torch.mul(dz[skip:], seen, out=z[skip:]).sum(0)
            dx[read].addcmul_(dz[skip:], taps[W - 1 - back])
    return dx, dtaps, doffset


def _convolve(x: Tensor, taps: Tensor, offset: Tensor | None, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Outputs ``start`` to ``stop`` of the convolution, and the (up to W − 1 more) rows of x in their window."""
    W = len(taps)
    seen = min(start, W - 1)
    window = x[start - seen : stop].to(taps.dtype)
    z = window[seen:] * taps[-1]
    if offset is not None:
        z += offset
    for back in range(1, min(W, len(window))):
        skip = max(0, back - seen)
        z[skip:].addcmul_(window[seen + skip - back : len(window) - back], taps[W - 1 - back])
    return z, window


def _wide(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(dtype).T.contiguous(), None if bias is None else bias.to(dtype)


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    T, D = x.shape
    size = max(1, BLOCK // D)
    return [(start, min(start + size, T)) for start in range(0, T, size)]
