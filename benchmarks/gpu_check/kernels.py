"""Checks of single blocks: the device's path on random inputs, against the CPU's path in fp64 or fp32.

Axis letters: T tokens, H heads, K key/value heads, D head dimension, E experts, R routed rows, N sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.fla_kernels import first_configuration, fla_kernels, repaired
from benchmarks.gpu_check.report import Report, outputs_and_gradients
from omni_train import platform
from omni_train.nn import causal_conv, delta_rule
from omni_train.nn.cross_entropy import chunked_cross_entropy
from omni_train.nn.packed_attention import (
    _sequence_by_sequence,
    packed_bidirectional_attention,
    packed_causal_attention,
)

# Arithmetic of the device -> the largest relative error. A product of fp32 numbers may be TF32's on a GPU (Triton's
# default), which keeps 10 bits; bf16 keeps 8.
LIMITS = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
EXACT = {torch.float32: 1e-4, torch.bfloat16: 1.2e-2}  # where fp32 is fp32


def dtypes() -> list[torch.dtype]:
    """Data types to check: fp32 and bf16 on a GPU, fp32 alone under the interpreter, whose bf16 is not accurate."""
    return [torch.float32, torch.bfloat16] if platform.has_cuda() else [torch.float32]


def boundaries(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def _compare(report: Report, name: str, dtype, path, reference, inputs: dict[str, Tensor], limits=LIMITS, **fixed):
    """Check `path` on the device in `dtype` against `reference` on the CPU, on the same numbers.

    `inputs` are of floating point, and stay fp32 where their name begins with `wide_`; `fixed` are arguments without
    gradients.
    """
    device = platform.device()
    there = {name: x.to(device, x.dtype if name.startswith("wide_") else dtype) for name, x in inputs.items()}
    inputs = {name: x.float().cpu() for name, x in there.items()}  # the same numbers, rounded alike
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in fixed.items()}
    wanted = outputs_and_gradients(reference, inputs, **fixed)
    got = outputs_and_gradients(path, there, **moved)
    limit = limits[dtype] if platform.has_cuda() else 1e-5
    report.same(f"{name}, {str(dtype)[6:]}", got, wanted, limit)


def gated_delta_net(report: Report) -> None:
    """Check flash-linear-attention's kernels, forward and backward, against our own in plain torch."""
    fla = fla_kernels()
    if fla is None:
        report.left_out("delta rule, convolution, l2norm", "flash-linear-attention is not installed")
        return
    gpu = platform.has_cuda()
    lengths = [640, 63, 1, 1000, 344] if gpu else [63, 64, 1, 41]
    T, H, D = sum(lengths), *((16, 128) if gpu else (2, 16))
    cu_seqlens = boundaries(lengths)
    draw = torch.Generator().manual_seed(17)
    q, k, v, x = (torch.randn(1, T, H, D, generator=draw) for _ in range(4))
    q, k = (delta_rule.l2norm(part) for part in (q, k))
    # Decays of up to 5 nats a token: over a chunk of 64 their inverse is more than fp32 holds.
    gates = {"wide_g": -torch.rand(1, T, H, generator=draw) * 5, "wide_beta": torch.rand(1, T, H, generator=draw)}
    state = torch.randn(len(lengths), H, D, D, generator=draw)

    def packed(kernel):
        return lambda q, k, v, wide_g, wide_beta, cu_seqlens: kernel(
            q, k, v, g=wide_g, beta=wide_beta, cu_seqlens=cu_seqlens
        )[0]

    def with_states(kernel):
        return lambda q, k, v, wide_g, wide_beta, wide_state, cu_seqlens: kernel(
            q,
            k,
            v,
            g=wide_g,
            beta=wide_beta,
            cu_seqlens=cu_seqlens,
            initial_state=wide_state,
            output_final_state=True,
        )

    def convolution(kernel):
        return lambda x, weight, cu_seqlens: kernel(x=x, weight=weight, activation="silu", cu_seqlens=cu_seqlens)[0]

    ours = delta_rule.chunk_gated_delta_rule
    rule = {"q": q, "k": k, "v": v, **gates}
    conv = {"x": x.reshape(1, T, -1), "weight": torch.randn(H * D, 4, generator=draw)}
    packing = {"cu_seqlens": cu_seqlens}
    with first_configuration():
        for dtype in dtypes():
            _compare(report, "delta rule, packed", dtype, packed(fla.rule), packed(ours), rule, **packing)
            kernels = with_states(fla.rule), with_states(ours)
            _compare(report, "delta rule with states", dtype, *kernels, rule | {"wide_state": state}, **packing)
            kernels = convolution(fla.convolution), convolution(causal_conv.causal_conv1d)
            _compare(report, "causal convolution", dtype, *kernels, conv, EXACT, **packing)
            _compare(report, "l2norm", dtype, fla.l2norm, delta_rule.l2norm, {"x": x}, EXACT)
            with repaired():
                case = "delta rule, packed, Hopper's repair"
                _compare(report, case, dtype, packed(fla.rule), packed(ours), rule, **packing)


def attention(report: Report) -> None:
    """Check packed attention at Qwen3.5's widths, both directions, also with fewer queries than keys."""
    lengths_q, lengths_k = [200, 17, 1, 300], [200, 90, 5, 651]
    draw = torch.Generator().manual_seed(18)

    def drawn(T: int, heads: int, D: int) -> Tensor:
        return torch.randn(T, heads, D, generator=draw)

    cases = {"equal": (lengths_q, lengths_q), "fewer queries than keys": (lengths_q, lengths_k)}
    for dtype in dtypes():
        for name, (queries, keys) in cases.items():
            inputs = {
                "query": drawn(sum(queries), 16, 256),
                "key": drawn(sum(keys), 2, 256),
                "value": drawn(sum(keys), 2, 256),
            }
            bounds = dict(boundaries_q=boundaries(queries), boundaries_k=boundaries(keys))
            path = packed_causal_attention if platform.has_cuda() else _as_on_a_gpu
            case = f"causal, 16/2 heads of 256, {name}"
            _compare(report, case, dtype, path, packed_causal_attention, inputs, EXACT, **bounds)
        for heads, D in ((16, 72), (20, 64)):  # the encoders': vision's and AuT's
            inputs = {part: drawn(sum(lengths_q), heads, D) for part in ("query", "key", "value")}
            bounds = dict(boundaries=boundaries(lengths_q))
            case = f"bidirectional, {heads} heads of {D}"
            _compare(report, case, dtype, packed_bidirectional_attention, _each_by_itself, inputs, EXACT, **bounds)
    if not platform.has_cuda():
        report.left_out("FlashAttention over packed sequences, bf16", "needs a GPU")


def _as_on_a_gpu(query, key, value, boundaries_q, boundaries_k):
    bounds = [list(pairwise(boundary.tolist())) for boundary in (boundaries_q, boundaries_k)]
    return _sequence_by_sequence(query, key, value, *bounds, None)


def _each_by_itself(query, key, value, boundaries):
    """Attention by the whole matrix of scores, sequence by sequence."""
    parts = []
    for start, end in pairwise(boundaries.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        parts.append(((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def experts(report: Report) -> None:
    """Check grouped products with experts without tokens, SwiGLU with the router's weight, and sums of rows."""
    from omni_train.nn.experts import weighted_swiglu
    from omni_train.nn.moe import _Gather, _Spread

    draw = torch.Generator().manual_seed(19)
    counts = torch.tensor([0, 130, 7, 1, 0, 262])
    E, R, width, hidden = len(counts), int(counts.sum()), 512, 256
    ends = counts.cumsum(0).int()

    def product(tokens, weight, ends):
        return F.grouped_mm(tokens, weight.transpose(1, 2), offs=ends)

    def one_by_one(tokens, weight, ends):
        parts = tokens.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ weight[expert].T for expert, part in enumerate(parts)])

    def swiglu(gate_up, wide_probs):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up * wide_probs[:, None]

    def fused_swiglu(gate_up, wide_probs):
        return weighted_swiglu(gate_up, wide_probs)

    def spread(tokens, source, rows):
        return _Spread.apply(tokens, source, rows)

    def plain_spread(tokens, source, rows):
        return tokens[source]

    def gather(tokens, source, rows):
        return _Gather.apply(tokens, source, rows)

    def plain_gather(tokens, source, rows):
        return tokens[rows].sum(1)

    T, K = 100, 4
    source = torch.arange(T).repeat_interleave(K)[torch.randperm(T * K, generator=draw)]
    places = {"source": source, "rows": source.argsort(stable=True).view(T, K)}
    for dtype in dtypes():
        inputs = {
            "tokens": torch.randn(R, hidden, generator=draw),
            "weight": torch.randn(E, width, hidden, generator=draw),
        }
        _compare(report, "grouped product", dtype, product, one_by_one, inputs, EXACT, ends=ends)
        inputs = {"gate_up": torch.randn(R, 2 * width, generator=draw), "wide_probs": torch.rand(R, generator=draw)}
        _compare(report, "SwiGLU", dtype, fused_swiglu, swiglu, inputs, EXACT)
        inputs = {"tokens": torch.randn(T, hidden, generator=draw)}
        _compare(report, "rows to experts", dtype, spread, plain_spread, inputs, EXACT, **places)
        inputs = {"tokens": torch.randn(T * K, hidden, generator=draw)}
        _compare(report, "rows from experts", dtype, gather, plain_gather, inputs, EXACT, **places)


def norms_and_loss(report: Report) -> None:
    """Check both kinds of RMSNorm, rotary at the ids of a row of 262,144 tokens, and the chunked loss."""
    from omni_train.nn.norm import _Normalize
    from omni_train.nn.rotary import TMRotaryEmbedding, apply_rotary

    draw = torch.Generator().manual_seed(20)
    wide, scale = torch.randn(300, 2048, generator=draw), torch.randn(2048, generator=draw) * 0.2
    ids = torch.randint(262144, (3, 300), generator=draw)
    embedding = TMRotaryEmbedding(64, 1e7, [11, 11, 10])

    def reference_rotary(x, ids):
        frequencies = embedding._frequency_F.double()
        angles = ids.double()[embedding._axis_F].T * frequencies
        cos, sin = (part.unsqueeze(1) for part in (angles.cos(), angles.sin()))
        first, second, rest = x.double().split([32, 32, x.shape[-1] - 64], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    gate = torch.randn(300, 2048, generator=draw)

    def gated_norm(x, weight, gate):
        return (_Normalize.apply(x, weight, 0.0, 1e-6) * F.silu(gate.float())).to(x.dtype)

    def plain_gated_norm(x, weight, gate):
        return F.rms_norm(x, (2048,), weight, 1e-6) * F.silu(gate)

    def plain_l2norm(x):
        return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    def rotary(x, ids):
        return apply_rotary(x, embedding(ids))

    device = platform.device()
    vocabulary, hidden = 5000, 256
    labels = torch.randint(vocabulary, (300,), generator=draw)
    labels[::7] = -100
    weights = torch.rand(300, generator=draw)

    def loss(hidden, weight, labels, weights):
        return chunked_cross_entropy(hidden, weight, labels, weights, chunk_tokens=64)[0]

    def plain_loss(hidden, weight, labels, weights):
        return (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * weights).sum()

    for dtype in dtypes():
        for offset in (0.0, 1.0):
            norm = lambda x, weight, offset=offset: _Normalize.apply(x, weight, offset, 1e-6)  # noqa: E731
            plain = lambda x, weight, offset=offset: F.rms_norm(x, (2048,), weight + offset, 1e-6)  # noqa: E731
            case = "RMSNorm, zero-centred" if offset else "RMSNorm"
            _compare(report, case, dtype, norm, plain, {"x": wide, "weight": scale}, EXACT)
        # As Megatron compiles it in Gated DeltaNet; without a GPU no code is generated.
        compiled = torch.compile(gated_norm, backend="inductor" if platform.has_cuda() else "eager")
        inputs = {"x": wide, "weight": scale, "gate": gate}
        _compare(report, "gated RMSNorm, compiled", dtype, compiled, plain_gated_norm, inputs, EXACT)
        inputs = {"x": wide.view(1, 300, 32, 64)}
        compiled = torch.compile(delta_rule.l2norm, backend="inductor" if platform.has_cuda() else "eager")
        _compare(report, "l2norm in torch, compiled", dtype, compiled, plain_l2norm, inputs, EXACT)
        x = torch.randn(300, 4, 256, generator=draw).to(dtype)
        got = outputs_and_gradients(rotary, {"x": x.to(device)}, ids=ids.to(device))
        want = outputs_and_gradients(reference_rotary, {"x": x.double()}, ids=ids)
        # An angle of 262,144 radians has 5 bits behind the point in fp32: 0.016 at worst, much less in the mean.
        report.same(f"rotary at long ids, {str(dtype)[6:]}", got, want, 2e-3 if dtype is torch.float32 else 2e-2)
        inputs = {
            "hidden": torch.randn(300, hidden, generator=draw),
            "weight": torch.randn(vocabulary, hidden, generator=draw) * 0.1,
        }
        _compare(report, "chunked loss", dtype, loss, plain_loss, inputs, EXACT, labels=labels, weights=weights)
