"""Speed and memory of a slice of Qwen3.5-35B-A3B, as one GPU of 8 that share the experts would compute it.

One block of four layers with 32 of the 256 experts (a rank of EP8 has as many, and gets as many tokens for them), the
whole embedding and head. A second block is measured too: the difference is what a block costs, and ten blocks are the
model. Communication is not measured.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter
from itertools import pairwise

import torch

from benchmarks.gpu_check.fla_kernels import few_configurations
from benchmarks.gpu_check.report import Report
from omni_train import platform
from omni_train.data.rows.batch import PackedBatch
from omni_train.platform.peak import peak_flops
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import Recipe

MODEL_BLOCKS = 10


def slice_recipe(blocks: int, row_tokens: int, recompute: str) -> Recipe:
    """Recipe of the released model, cut down to a slice."""
    sizes = (f"thinker.repeats={blocks}", "thinker.num_experts=32", "thinker.mtp_num_hidden_layers=0")
    changes = ("audio=null", "vision=null", *sizes)
    return load_recipe(
        [
            "stage=s2_general",
            "model=flash_35b_a3b",
            *(f"model.{change}" for change in changes),
            "parallel=single",
            "data.path=/nowhere",
            f"data.row_tokens={row_tokens}",
            f"recompute={recompute}",
            "schedule.global_batch=1",
        ]
    )


def filled_row(recipe: Recipe, seed: int) -> PackedBatch:
    """Row filled with random text in sequences of 256 to 8,192 tokens."""
    draw = torch.Generator().manual_seed(seed)
    T, alignment = recipe.data.row_tokens, recipe.data.alignment
    bounds = [0]
    while bounds[-1] < T:
        length = int(torch.randint(256, 8193, (1,), generator=draw)) // alignment * alignment
        bounds.append(min(T, bounds[-1] + length))
    tokens = torch.randint(recipe.model.vocab_size, (T,), generator=draw)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    return PackedBatch(
        tokens=tokens,
        labels=tokens.roll(-1),
        loss_weights=torch.ones(T),
        position_ids=positions.expand(3, -1).contiguous(),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        padding=torch.zeros(T, dtype=torch.bool),
        samples=len(bounds) - 1,
    )


class Slice:
    """Engine on the slice, which measures the cost of a micro-batch."""

    def __init__(self, blocks: int, row_tokens: int, recompute: str) -> None:
        from omni_train.training.engines.megatron import MegatronEngine

        self.recipe = slice_recipe(blocks, row_tokens, recompute)
        platform.parallel.initialize(self.recipe.parallel, self.recipe.seed)
        self.engine = MegatronEngine(self.recipe)
        self.rows = [filled_row(self.recipe, seed) for seed in range(3)]
        self.taken = 0

    def step(self, rows: int) -> float:
        """Seconds of an optimizer step over as many rows."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = self.engine.train_step(self.rows[:rows], 1e-6, self.taken)
        torch.cuda.synchronize()
        self.taken += 1
        assert result.updated, result.metrics
        return time.perf_counter() - start

    def row_seconds(self) -> tuple[float, float]:
        """(forward and backward of a row, the optimizer's part of a step), of medians of three steps."""
        self.step(1)
        one, three = (sorted(self.step(rows) for _ in range(3))[1] for rows in (1, 3))
        each = (three - one) / 2
        return each, one - each

    def close(self) -> None:
        """Free the memory."""
        del self.engine
        platform.parallel.destroy()
        gc.collect()
        torch.cuda.empty_cache()


def flash_slice(report: Report) -> None:
    """Measure rows of 16k and 32k tokens, with nothing and with everything recomputed."""
    if not platform.has_cuda():
        report.left_out("MFU, tokens/s and memory of a slice of 35B-A3B", "needs a GPU")
        return
    platform.init_distributed()
    for row_tokens, recompute in ((16384, "none"), (32768, "full"), (32768, "none")):
        name = f"{row_tokens // 1024}k, recompute={recompute}"
        try:
            with few_configurations():
                _measure(report, name, row_tokens, recompute)
        except torch.OutOfMemoryError:
            report.left_out(name, "this GPU's memory is too small")
            platform.parallel.destroy()
        gc.collect()
        torch.cuda.empty_cache()


def _measure(report: Report, name: str, row_tokens: int, recompute: str) -> None:
    seconds = {}
    for blocks in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        part = Slice(blocks, row_tokens, recompute)
        each, optimizer = part.row_seconds()
        seconds[blocks] = each
        flops = part.engine.flops(part.rows[:1])
        case = f"{blocks} block{'s' * (blocks > 1)}, {name}"
        report.measure(f"{case}: a row", each, "s", f"and {optimizer:.3f} s of optimizer a step")
        report.measure(f"{case}: tokens/s", row_tokens / each, "tokens/s")
        if (peak := peak_flops()) is not None:
            report.measure(f"{case}: MFU", 100 * flops / each / peak, "%", "of the data sheet's dense bf16 rate")
        report.measure(f"{case}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        if blocks == 1 and recompute == "none" and row_tokens == 16384:
            _moe_layer(report, part)
            _synchronisations(report, part)
            _top_kernels(report, part)
        part.close()
    block = seconds[2] - seconds[1]
    whole = seconds[1] + (MODEL_BLOCKS - 1) * block
    report.measure(f"35B-A3B, {name}: a row, computed from both", whole, "s", f"{block:.3f} s a block")
    report.measure(f"35B-A3B, {name}: tokens/s of a GPU", row_tokens / whole, "tokens/s", "without communication")
    if (peak := peak_flops()) is not None:
        model = slice_recipe(MODEL_BLOCKS, row_tokens, recompute)
        from omni_train.models.thinker.flops import step_flops

        flops = step_flops(model.model, [filled_row(model, 0)])
        report.measure(f"35B-A3B, {name}: MFU", 100 * flops / whole / peak, "%", "without communication")


def _moe_layer(report: Report, part: Slice) -> None:
    """Check a layer at full width against its own experts one after the other, in fp32: late counts would show."""
    from megatron.core.utils import get_attr_wrapped_model

    layers = get_attr_wrapped_model(part.engine.chunks[0], "decoder").layers
    mlp = next(layer.mlp for layer in layers if hasattr(layer, "mlp") and hasattr(layer.mlp, "experts"))
    draw = torch.Generator(device="cuda").manual_seed(3)
    hidden = torch.randn(8192, 1, mlp.config.hidden_size, generator=draw, device="cuda").bfloat16()
    worst = 0.0
    with torch.no_grad():
        probs, routed = mlp.router(hidden)
        x = hidden[:, 0].float()
        want = torch.zeros_like(x)
        for expert in range(routed.shape[1]):
            chosen = routed[:, expert].nonzero()[:, 0]
            gate, up = (x[chosen] @ mlp.experts.linear_fc1.weight[expert].float().T).chunk(2, -1)
            made = (torch.nn.functional.silu(gate) * up) @ mlp.experts.linear_fc2.weight[expert].float().T
            want[chosen] += made * probs[chosen, expert][:, None].float()
        if mlp.shared_experts is not None:
            want += mlp.shared_experts(hidden)[:, 0].float()
        for _ in range(20):
            worst = max(worst, float((mlp(hidden)[0][:, 0].float() - want).norm() / want.norm()))
    report.check("MoE layer, 32 experts, 8,192 tokens, 20 times over", worst, 2e-2)


def _synchronisations(report: Report, part: Slice) -> None:
    """Count how often a step makes the host wait for the GPU, and where."""
    part.step(1)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part.engine.train_step(part.rows[:1], 1e-6, part.taken)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{one.filename.split('site-packages/')[-1]}:{one.lineno}" for one in caught)
    where = ", ".join(f"{place} ×{count}" for place, count in places.most_common(12))
    report.measure("synchronisations of a step, 4 layers", len(caught), "", where)


def _top_kernels(report: Report, part: Slice) -> None:
    """Measure the kernels that take most of a step's time."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        part.step(1)
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in events) or 1
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:16]:
        share = 100 * event.self_device_time_total / total
        report.measure(f"kernel {event.key[:90]}", share, "% of the GPU's time", f"×{event.count}")
