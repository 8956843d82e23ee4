"""The gated delta rule on CPU, chunk by chunk, forward and backward written out by hand.

One head's state S is a K×V matrix. At each token it decays, forgets what the key reads and writes the value there
(Gated Delta Networks, arXiv 2412.06464, eq. 10; the chunked form is that of section 3.3 and of arXiv 2406.06484):

    S_t = exp(g_t) S_{t-1} + β_t k_t (v_t − k_tᵀ exp(g_t) S_{t-1})ᵀ        o_t = scale · q_tᵀ S_t

β enters only through the written key k̃ = βk. With γ the sum of g within a chunk and D_ij = exp(γ_i − γ_j), a chunk that
starts from the state S writes the values Y and leaves the state S′:

    Y  = T (V − a∘KS)                 T = (I + strict_lower(K K̃ᵀ ∘ D))⁻¹       a = exp(γ)
    O  = a∘QS + (Q K̃ᵀ ∘ D) Y
    S′ = d S + (b∘K̃)ᵀ Y               b_i = exp(γ_last − γ_i)                  d = exp(γ_last)

Chunks are cut through a packed row without regard to its sequences: where a boundary falls into a chunk, D is zero
between tokens of different sequences, a is zero past the first boundary, b before the last one, and d is zero.
Only the two lines with S are sequential; everything else is one batched product over many chunks.

Axis letters: B batch, T tokens, H heads, K and V head dimensions, N sequences, C chunks, L tokens of a chunk,
G = B·H heads of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32
"""Tokens of a chunk, L; a power of two."""

BLOCK_ROWS = 1 << 12
"""Head tokens (chunks·G·L) of a block, so that temporaries stay in cache however long the row is."""


@dataclass
class Layout:
    """Layout of packed sequences on chunks."""

    begins: dict[int, int]  # chunk -> sequence whose initial state it starts from
    ends: dict[int, int]  # chunk -> sequence whose final state it leaves
    sequence: Tensor | None = None  # (T,) sequence of each token, where boundaries may fall inside chunks


class _Block(NamedTuple):
    """Tensors of a block of chunks that do not depend on the state; n = chunks·G, the leading axis of products."""

    queries_keys: Tensor  # (n, 2, L, K)
    written_keys: Tensor  # (n, L, K), k̃
    values: Tensor  # (n, L, V)
    decay: Tensor  # (n, 1, L, L), D
    scores: Tensor  # (n, 2, L, L): Q K̃ᵀ ∘ D, and K K̃ᵀ ∘ D below the diagonal
    inverse: Tensor  # (n, L, L), T
    from_start: Tensor  # (n, L, 1), a
    to_end: Tensor  # (n, L, 1), b
    through: Tensor  # (n, 1, 1), d
    reads: Tensor  # (n, L, K), T (a∘K)
    carried_keys: Tensor  # (n, L, K), b∘K̃


class GatedDeltaRule(torch.autograd.Function):
    """Chunked gated delta rule: ``apply(q, k, v, g, beta, initial, scale, layout)`` -> output and final states.

    The output is (B, T, H, V). Other shapes are those of :func:`omni_train.nn.delta_rule.chunk_gated_delta_rule`, but
    states hold the heads of all rows on one axis, (N, G, K, V). Saves its inputs and the state at the start of every
    block; the rest is computed again in backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, scale: float, layout: Layout):
        B, T, H, K = k.shape
        V, G, C = v.shape[-1], B * H, -(-T // CHUNK)
        output = torch.empty(B, T, H, V, dtype=q.dtype, device=q.device)
        final = initial.clone()
        blocks = _blocks(C, G)
        states = initial.new_zeros(len(blocks) + 1, G, K, V)
        for i, (first, last) in enumerate(blocks):
            block = _prepare(q, k, v, g, beta, layout, first, last)
            before, written, states[i + 1] = _scan(block, states[i], initial, layout, first, final)
            o = torch.bmm(block.queries_keys[:, 0], before).mul_(block.from_start)
            o.baddbmm_(block.scores[:, 0], written).mul_(scale)
            _from_chunks(o, output, first)
        ctx.save_for_backward(q, k, v, g, beta, initial, states)
        ctx.scale, ctx.layout = scale, layout
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput, dfinal):
        q, k, v, g, beta, initial, states = ctx.saved_tensors
        layout = ctx.layout
        G, K, V = initial.shape[1:]
        blocks = _blocks(-(-k.shape[1] // CHUNK), G)
        dq, dk, dv, dg, dbeta = (torch.empty_like(x) for x in (q, k, v, g, beta))
        dinitial = dfinal.clone()
        carried = torch.zeros_like(initial[0])
        for state, (first, last) in reversed(list(zip(states[:-1], blocks, strict=True))):
            block = _prepare(q, k, v, g, beta, layout, first, last)
            before, written, _ = _scan(block, state, initial, layout, first)

            # Rows 0 and 1 take the gradients of what queries and keys read: dO and −dV.
            dread = written.new_empty(len(written), 2, CHUNK, V)
            do = dread[:, 0]
            do.copy_(_to_chunks(doutput, first, last)).mul_(ctx.scale)
            dwritten = torch.bmm(block.scores[:, 0].mT, do)  # so far through O only
            dstates = written.new_empty(last - first + 1, G, K, V)
            dstates[-1] = carried
            from_output = (block.queries_keys[:, 0] * block.from_start).mT
            torch.bmm(from_output, do, out=dstates[:-1].view(-1, K, V))
            steps = [x.unflatten(0, (-1, G)) for x in (dwritten, block.reads.mT, block.carried_keys, block.through)]
            for c in reversed(range(last - first)):
                dy, reads, keys, through = (x[c] for x in steps)
                if c + first in layout.ends:
                    dstates[c + 1] = dfinal[layout.ends[c + first]]
                dy.baddbmm_(keys, dstates[c + 1])
                dstates[c].baddbmm_(reads, dy, alpha=-1).addcmul_(dstates[c + 1], through)
                if c + first in layout.begins:
                    dinitial[layout.begins[c + first]] = dstates[c]
            carried = dstates[0]
            after = dstates[1:].flatten(0, 1)

            dvalues = torch.bmm(block.inverse.mT, dwritten)
            torch.neg(dvalues, out=dread[:, 1])
            dread = dread.view(-1, 2 * CHUNK, V)
            dscores = torch.bmm(dread, written.mT).view_as(block.scores).mul_(block.decay)
            # What a query reads of its own token's write has not decayed. It stays out of dγ, where it would cancel,
            # but leave a rounding error larger than the gradient itself if little outlives a token.
            diagonals = dscores.diagonal(dim1=-2, dim2=-1)
            own = diagonals[:, 0].unsqueeze(-1).clone()
            diagonals.zero_()
            dscores = dscores.view(-1, 2 * CHUNK, CHUNK)
            dqk = torch.bmm(dread, before.mT).view_as(block.queries_keys).mul_(block.from_start.unsqueeze(1))
            dqk.view(-1, 2 * CHUNK, K).baddbmm_(dscores, block.written_keys)
            dkeys = torch.bmm(written, after.mT).mul_(block.to_end)
            to_last = (dkeys * block.written_keys).sum((1, 2)) + block.through.flatten() * (before * after).sum((1, 2))
            dkeys.baddbmm_(dscores.mT, block.queries_keys.view(-1, 2 * CHUNK, K))

            # Each read carries exp(γ_i), each write exp(−γ_j), what reaches the end of the chunk exp(γ_last).
            dgamma = (dqk * block.queries_keys).sum((1, 3)) - (dkeys * block.written_keys).sum(2)
            dgamma[:, -1] += to_last
            dlog_decay = dgamma.flip(-1).cumsum(-1).flip(-1)
            dqk[:, 0].addcmul_(own, block.written_keys)
            dkeys.addcmul_(own, block.queries_keys[:, 0])
            keys_n, beta_n = block.queries_keys[:, 1], _to_chunks(beta.unsqueeze(-1), first, last)
            dstrength = (dkeys * keys_n).sum(-1, keepdim=True)
            _from_chunks(dqk[:, 0], dq, first)
            _from_chunks(dqk[:, 1].addcmul_(dkeys, beta_n), dk, first)
            _from_chunks(dvalues, dv, first)
            _from_chunks(dlog_decay.unsqueeze(-1), dg.unsqueeze(-1), first)
            _from_chunks(dstrength, dbeta.unsqueeze(-1), first)
        return dq, dk, dv, dg, dbeta, dinitial, None, None


def _prepare(q, k, v, g, beta, layout: Layout, first: int, last: int) -> _Block:
    B, T, H, K = k.shape
    n = (last - first) * B * H
    queries_keys = torch.empty(n, 2, CHUNK, K, dtype=compute_dtype(q), device=q.device)
    queries_keys[:, 0] = _to_chunks(q, first, last)
    queries_keys[:, 1] = _to_chunks(k, first, last)
    keys, values = queries_keys[:, 1], _to_chunks(v, first, last)
    written_keys = keys * _to_chunks(beta.unsqueeze(-1), first, last)

    gamma = _to_chunks(g.unsqueeze(-1), first, last).cumsum(1)
    last_gamma = gamma[:, -1:]
    decay = gamma - gamma.mT
    if layout.sequence is None:
        # Masked before exp: above the diagonal the difference is positive and may overflow.
        decay += torch.full((CHUNK, CHUNK), -torch.inf, dtype=decay.dtype, device=decay.device).triu_(1)
        from_start, to_end, through = gamma.exp(), (last_gamma - gamma).exp_(), last_gamma.exp()
    else:
        apart, past_first, before_last, broken = _boundary_masks(layout.sequence, first, last, decay.dtype)
        decay.view(last - first, H, CHUNK, CHUNK).add_(apart)
        from_start, to_end, through = (
            (x.view(last - first, H, -1, 1) + mask).exp_().view(n, -1, 1)
            for x, mask in ((gamma, past_first), (last_gamma - gamma, before_last), (last_gamma, broken))
        )
    decay = decay.exp_().unsqueeze(1)

    scores = torch.bmm(queries_keys.view(n, 2 * CHUNK, K), written_keys.mT).view(n, 2, CHUNK, CHUNK).mul_(decay)
    inverse = _unit_lower_inverse(scores[:, 1])
    reads = torch.bmm(inverse, keys * from_start)
    return _Block(
        queries_keys, written_keys, values, decay, scores, inverse, from_start, to_end, through, reads,
        written_keys * to_end,
    )  # fmt: skip


def _scan(block: _Block, state: Tensor, initial: Tensor, layout: Layout, first: int, final: Tensor | None = None):
    """Carry the state (G, K, V) through the chunks of a block.

    Returns the state that each chunk starts from (n, K, V), the values written, Y (n, L, V), and the state after the
    last chunk. Puts the states of sequences that end here into ``final``.
    """
    G = len(state)
    written = torch.bmm(block.inverse, block.values)
    steps = [x.unflatten(0, (-1, G)).unbind() for x in (written, block.reads, block.carried_keys.mT, block.through)]
    before = state.new_empty(len(steps[0]), *state.shape)
    for c, (start, y, reads, keys, through) in enumerate(zip(before.unbind(), *steps, strict=True), start=first):
        start.copy_(initial[layout.begins[c]] if c in layout.begins else state)
        y.baddbmm_(reads, start, alpha=-1)
        state = torch.baddbmm(start * through, keys, y)
        if final is not None and c in layout.ends:
            final[layout.ends[c]] = state
    return before.flatten(0, 1), written, state


def _boundary_masks(sequence_T: Tensor, first: int, last: int, dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """0 or −inf, to be added to exponents of chunks ``first`` to ``last``: between tokens of different sequences
    or above the diagonal (c, 1, L, L); on tokens that the incoming state does not reach (c, 1, L, 1); on tokens that do
    not reach the end of the chunk (c, 1, L, 1); where the state does not pass through the chunk (c, 1, 1, 1)."""
    index = torch.arange(first * CHUNK - 1, last * CHUNK, device=sequence_T.device).clamp_(0, len(sequence_T) - 1)
    sequence = sequence_T[index]
    before = sequence[:-1:CHUNK].view(-1, 1, 1, 1)  # the token before the chunk
    inside = sequence[1:].view(-1, 1, CHUNK, 1)
    end = inside[:, :, -1:]
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=sequence.device).tril_()
    reached = ((inside == inside.mT) & causal, inside == before, inside == end, end == before)
    return tuple(torch.zeros(x.shape, dtype=dtype, device=x.device).masked_fill_(~x, -torch.inf) for x in reached)


def _unit_lower_inverse(matrix: Tensor) -> Tensor:
    """Inverse of I + the strictly lower part of (n, L, L): pairs of diagonal blocks are joined until one is left.

    As stable as forward substitution, and all of it batched products; (I − A)(I + A²)(I + A⁴)… would be neither
    cheaper nor, for keys that resemble each other, accurate.
    """
    n, L, _ = matrix.shape
    size = 1
    inverse = matrix.new_ones(n * L, 1, 1)
    while size < L:
        corners = matrix.unflatten(2, (-1, 2 * size)).unflatten(1, (-1, 2 * size)).diagonal(dim1=1, dim2=3)
        lower_left = corners[:, size:, :size].permute(0, 3, 1, 2).reshape(-1, size, size)
        upper, lower = inverse.view(-1, 2, size, size).unbind(1)
        inverse = matrix.new_zeros(len(lower_left), 2 * size, 2 * size)
        inverse[:, :size, :size] = upper
        inverse[:, size:, size:] = lower
        inverse[:, size:, :size] = torch.bmm(lower, lower_left).bmm(upper).neg_()
        size *= 2
    return inverse


def _blocks(chunks: int, heads: int) -> list[tuple[int, int]]:
    size = max(1, BLOCK_ROWS // (heads * CHUNK))
    return [(first, min(first + size, chunks)) for first in range(0, chunks, size)]


def _to_chunks(x: Tensor, first: int, last: int) -> Tensor:
    """Chunks ``first`` to ``last`` of (B, T, H, D) as (chunks·B·H, L, D), widened, with zeros past the end."""
    B, T, H, D = x.shape
    x = x[:, first * CHUNK : last * CHUNK]
    missing = (last - first) * CHUNK - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    x = x.view(B, -1, CHUNK, H, D).permute(1, 0, 3, 2, 4)
    return x.to(compute_dtype(x), memory_format=torch.contiguous_format).reshape(-1, CHUNK, D)


def _from_chunks(x: Tensor, into: Tensor, first: int) -> None:
    """Write (chunks·B·H, L, D) to (B, T, H, D) from chunk ``first`` on."""
    B, T, H, D = into.shape
    x = x.unflatten(0, (-1, B, H)).permute(1, 0, 3, 2, 4)
    whole = into[:, first * CHUNK : first * CHUNK + x.shape[1] * CHUNK]
    whole.copy_(x.reshape(B, -1, H, D)[:, : whole.shape[1]])


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which an input is computed: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
