"""Whole optimizer steps of small models on the device, against the same steps on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.gpu_check import scenarios
from benchmarks.gpu_check.fla_kernels import first_configuration, fla_kernels
from benchmarks.gpu_check.report import Report
from omni_train import platform
from omni_train.recipe.schema import Precision, Recompute

LIMITS = {Precision.fp32: (1e-3, 1e-2), Precision.bf16: (5e-3, 5e-2)}
"""Relative errors of losses and of gradient norms; TF32 in the delta rule leaves three digits of fp32."""


class Reference:
    """The CPU's numbers, made by a process without a GPU beside the other parts."""

    def __init__(self) -> None:
        names = [] if platform.has_cuda() else ["AdamW"]  # what it is compared with
        self._temporary = tempfile.TemporaryDirectory(prefix="gpu_check_")
        self.folder = Path(self._temporary.name)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"),
        }
        self._log = (self.folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.scenarios", str(self.folder), *names],
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def metrics(self) -> dict[str, list[dict]]:
        """Of every scenario. Waits for the process.

        Raises:
            RuntimeError: it failed.
        """
        if self._process.wait():
            raise RuntimeError("the CPU's reference failed: " + (self.folder / "log").read_text()[-1500:])
        return json.loads((self.folder / "reference.json").read_text())

    def stop(self) -> None:
        """End the process, and remove what it wrote."""
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._temporary.cleanup()


def same_steps(report: Report, name: str, got: list[dict], want: list[dict], loss: float, norm: float) -> None:
    """Losses and gradient norms of every step."""
    for key, limit in {key: norm if key.startswith("grad_norm") else loss for key in _compared(want[0])}.items():
        error = max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-9) for a, b in zip(got, want, strict=True))
        report.check(f"{name}, {len(want)} steps: {key}", error, limit)


def _compared(metrics: dict) -> list[str]:
    return [key for key in metrics if key == "loss" or key.startswith(("grad_norm", "mtp_loss", "aux"))]


def steps(report: Report, reference: Reference) -> None:
    """AdamW and Muon in fp32, recomputed, in bf16, saved and resumed; the ZeRO engine's networks."""
    metrics = reference.metrics()
    platform.init_distributed()
    start = scenarios.initial(reference.folder, "thinker")
    with first_configuration():
        if platform.has_cuda():
            _on_a_gpu(report, metrics, reference.folder, start)
        else:
            _on_the_cpu(report, metrics, start)


def _on_a_gpu(report: Report, metrics: dict, folder: Path, start: Path) -> None:
    fp32 = LIMITS[Precision.fp32]
    for name, recipe in scenarios.thinker_scenarios().items():
        same_steps(report, name, scenarios.thinker(recipe, start), metrics[name], *LIMITS[recipe.precision])
    for recompute in (Recompute.selective, Recompute.full):
        history = scenarios.thinker(scenarios.thinker_recipe(recompute=recompute), start)
        same_steps(report, f"recompute={recompute}", history, metrics["AdamW"], *fp32)
    _resume(report, folder, start)
    _write_text(report, start)
    for name, recipe in scenarios.zero_recipes().items():
        if name not in metrics:
            report.left_out(f"ZeRO: {name}", "deepspeed is not installed")
            continue
        history = scenarios.zero(recipe, scenarios.initial(folder, name))
        same_steps(report, f"ZeRO: {name}", history, metrics[name], *fp32)


def _resume(report: Report, folder: Path, start: Path) -> None:
    """A checkpoint written while training goes on, and gone on from, in bf16 with fp32 masters."""
    recipe, at = scenarios.thinker_scenarios()["AdamW, bf16"], 2
    straight = scenarios.thinker(recipe, start, save=(folder / "resumed", at))
    resumed = scenarios.thinker(recipe, None, save=(folder / "resumed", -1))
    # Sums in an order that the device chooses; optimizer states that are lost or shifted show as 1e-2.
    same_steps(report, "resumed, bf16", resumed, straight[at:], 2e-4, 5e-3)


def _write_text(report: Report, start: Path) -> None:
    """Greedy text with caches, against the whole model run over everything written."""
    import torch

    from omni_train.checkpoint.sharded import load_model
    from omni_train.data.rows.batch import IGNORE
    from omni_train.data.rows.packing import pack
    from omni_train.data.rows.sequences import TokenSequence
    from omni_train.models.row import LocalRow
    from omni_train.models.thinker import build_chunks
    from omni_train.rollout.generate import generate

    recipe = scenarios.thinker_recipe()
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    chunks = build_chunks(recipe)
    load_model(chunks, start, recipe.model)
    draw = np.random.default_rng(5)

    def sequence(tokens) -> TokenSequence:
        return TokenSequence(np.array(tokens, np.int32), np.full(len(tokens), IGNORE, np.int32))

    prompts = [draw.integers(recipe.model.vocab_size, size=size).tolist() for size in (3, 41, 17)]
    answers = generate(chunks[0], [sequence(prompt) for prompt in prompts], max_new_tokens=12, stop_tokens=[])
    worst = 0.0
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            whole = sequence([*prompt, *answer.tokens])
            row = LocalRow.from_batch(pack([whole], row_tokens=len(whole), alignment=1, padding_token=0), media=True)
            log_probs = chunks[0].logits(chunks[0](row)).float().log_softmax(-1)[len(prompt) - 1 : -1]
            again = log_probs.gather(1, torch.tensor(answer.tokens, device=log_probs.device)[:, None])[:, 0]
            worst = max(worst, float((again.cpu() - torch.tensor(answer.log_probs)).abs().max()))
    platform.parallel.destroy()
    report.check("text written with caches: log-probabilities", worst, 1e-2)


def _on_the_cpu(report: Report, metrics: dict, start: Path) -> None:
    """The same steps with flash-linear-attention's kernels, interpreted, in Gated DeltaNet."""
    report.left_out(
        "bf16, recomputation, resuming, generation, ZeRO", "they are compared with the CPU's, and this is it"
    )
    fla = fla_kernels()
    if fla is None:
        report.left_out("steps with interpreted kernels", "flash-linear-attention is not installed")
        return
    from megatron.core.ssm.gated_delta_net import common, gdn

    for module in (common, gdn):
        module.causal_conv1d, module.chunk_gated_delta_rule = fla.convolution, fla.rule
    common.l2norm = fla.l2norm
    history = scenarios.thinker(scenarios.thinker_recipe(), start, steps=2)
    same_steps(report, "AdamW, interpreted kernels", history, metrics["AdamW"][:2], 1e-5, 1e-4)
