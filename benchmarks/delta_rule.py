"""The gated delta rule on CPU against ``transformers``' on a row of 4,096 tokens. `run()` gives the rows of
`docs/performance.md`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

from omni_train.nn.delta_rule import chunk_gated_delta_rule, l2norm

TOKENS = 4096
SEQUENCES = 64
HEADS = ((8, 32), (16, 64))  # heads, and their dimension
ROUNDS = 7


def run() -> list[dict]:
    """Rows of name, value and unit: seconds of forward + backward in fp32, and ratios."""
    return [row for heads, dim in HEADS for row in _compare(heads, dim)]


def _compare(heads: int, dim: int) -> list[dict]:
    torch.manual_seed(heads * dim)
    q, k = (l2norm(torch.randn(1, TOKENS, heads, dim)) for _ in range(2))
    inputs = (q, k, torch.randn_like(q), -torch.rand(1, TOKENS, heads), torch.rand(1, TOKENS, heads))
    inputs = [x.requires_grad_() for x in inputs]
    inner = torch.randperm(TOKENS - 1)[: SEQUENCES - 1].sort().values + 1
    cu_seqlens = torch.cat((torch.tensor([0]), inner, torch.tensor([TOKENS]))).int()
    one, packed, reference = _best(
        lambda: chunk_gated_delta_rule(*inputs)[0],
        lambda: chunk_gated_delta_rule(*inputs, cu_seqlens=cu_seqlens)[0],
        lambda: torch_chunk_gated_delta_rule(*inputs)[0],
        leaves=inputs,
    )
    size = f"T={TOKENS}, {heads} heads of {dim}"
    return [
        {"name": f"delta rule, one sequence, {size}", "value": one, "unit": "s"},
        {"name": f"delta rule, {SEQUENCES} sequences, {size}", "value": packed, "unit": "s"},
        {"name": f"delta rule of transformers, one sequence, {size}", "value": reference, "unit": "s"},
        {"name": f"delta rule, speed against transformers, {size}", "value": reference / one, "unit": "×"},
        {"name": f"delta rule, time of {SEQUENCES} sequences to one, {size}", "value": packed / one, "unit": "×"},
    ]


def _best(*functions: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> list[float]:
    """Best seconds of forward and backward of each function; they take turns, so a busy machine slows all alike."""
    seconds = [[] for _ in functions]
    for _ in range(ROUNDS + 1):
        for function, own in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            output = function()
            torch.autograd.grad(output, leaves, torch.ones_like(output))
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in seconds]  # the first round warms up


def main() -> None:
    torch.set_num_threads(2)
    for row in run():
        print(f"{row['name']}: {row['value']:.3f} {row['unit']}")


if __name__ == "__main__":
    main()
