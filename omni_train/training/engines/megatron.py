"""The Megatron engine: one optimizer step over a global batch of rows, in any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.utils import unwrap_model

from omni_train.checkpoint.sharded import CheckpointStore, check_sharding
from omni_train.checkpoint.start import initialize
from omni_train.models.stage import PipelineStage
from omni_train.nn import balance
from omni_train.objectives.base import GlobalBatch, Metric, Objective
from omni_train.recipe.networks import held
from omni_train.recipe.schema import OptimizerName, Recipe
from omni_train.training.engines.base import Engine, StepResult, global_sums
from omni_train.training.engines.gradients import Arrivals
from omni_train.training.engines.metrics import Totals
from omni_train.training.engines.microbatches import Microbatches
from omni_train.training.engines.muon import mark_matrices
from omni_train.training.engines.optimizer import build_optimizer, freeze, guarded_step, set_learning_rate


class MegatronEngine(Engine):
    """Model, optimizer and step on Megatron's schedules. Process groups must exist."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        networks = self.spec.build(recipe, self.frozen)
        modules: list[PipelineStage] = networks["model"]
        objective = self.spec.objective(recipe, networks, self.frozen)
        assert isinstance(objective, Objective), f"network={recipe.network}: this engine needs an Objective"
        self.objective: Objective = objective
        named = [pair for module in modules for pair in module.global_parameters()]
        freeze(named, recipe.trainable)
        for module in modules:
            module.keep_frozen()
        self._arrivals: Arrivals | None = Arrivals(named)
        if recipe.optimizer.name is OptimizerName.muon:
            for module in modules:
                mark_matrices(module)
        parts = torch.distributed.get_world_size() // parallel_state.get_data_parallel_world_size()
        self.parameters = parts * sum(parameter.numel() for _, parameter in named)  # all parts as large as this one
        self.config = modules[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=True,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, module, disable_bucketing=index > 0)
            for index, module in enumerate(modules)
        ]
        for chunk in self.chunks:
            chunk.broadcast_params()
        # Gradients are sums of terms already divided by the global batch: nothing to divide at the end.
        self.config.finalize_model_grads_func = _finalize
        check_sharding(self.chunks)
        self.optimizer = build_optimizer(recipe, self.chunks, named)
        self._microbatches = Microbatches(recipe.data.row_tokens)
        self._totals = Totals(
            torch.float32,
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        )

    def open_store(self, directory: Path) -> CheckpointStore:
        return CheckpointStore(directory, self.recipe.checkpoint, held(self.recipe))

    def initialize(self, store: CheckpointStore) -> None:
        recipe = self.spec.starting(self.recipe)
        if recipe.init_from or recipe.init_parts:
            start = initialize(self.chunks, recipe)
            if start is not None:
                store.carry_from(start)
            self.optimizer.reload_model_params()

    def resume(self, store: CheckpointStore, checkpoint: Path) -> dict:
        return store.load(checkpoint, self.chunks, self.optimizer)

    def save(self, store: CheckpointStore, step: int, progress: dict, loader_state: Any) -> None:
        store.save(step, self.chunks, self.optimizer, progress, loader_state)

    def network(self) -> PipelineStage:
        return unwrap_model(self.chunks[0])

    def expert_loads(self) -> dict[int, list[float]]:
        return balance.loads(self.chunks, parallel_state.get_pipeline_model_parallel_group())

    def close(self) -> None:
        """Nothing is held beside the model."""

    def train_step(self, rows: list, learning_rate: float, step: int = 0) -> StepResult:
        sums = global_sums(
            self.objective, rows, parallel_state.get_data_parallel_group(), strata=self.recipe.data.strata
        )
        batch = GlobalBatch(max(sums.weight, 1.0), step, training=True)
        rows = self.prepared(rows)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        balance.begin_step(self.chunks, sums.tokens)
        metrics = self._totals.over(self._go_over(rows, batch), training=True)
        if self._arrivals is not None:
            self._arrivals.check(step)
            self._arrivals = None
        set_learning_rate(self.optimizer.param_groups, learning_rate, self.recipe.optimizer.weight_decay)
        metrics["grad_norm"], updated = guarded_step(self.optimizer, metrics["loss"], self.recipe.optimizer.clip_grad)
        metrics |= balance.end_step(
            self.chunks,
            group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            keep=updated,
        )
        if updated:
            metrics |= self.objective.after_step(step)
        else:
            self.objective.after_skipped_step()
        return StepResult.of(sums, metrics, updated)

    @torch.no_grad()
    def evaluate(self, rows: list) -> dict[str, float]:
        sums = global_sums(self.objective, rows, parallel_state.get_data_parallel_group())
        rows = self.prepared(rows)
        for chunk in self.chunks:
            chunk.eval()
        metrics = self._totals.over(self._go_over(rows, GlobalBatch(max(sums.weight, 1.0), 0, False)), training=False)
        for chunk in self.chunks:
            chunk.train()
        return metrics

    def forward(
        self, frozen: Sequence[torch.nn.Module], rows: Sequence[Any], read: Callable[..., dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        with self.on_device(*frozen):
            return self._microbatches.forward(frozen, rows, read)

    def _go_over(self, rows: list, batch: GlobalBatch) -> list[dict[str, Metric]]:
        """Run the micro-batches; the metrics of each, on the last pipeline stage."""
        objective = partial(self.objective, batch=batch)

        def step(remaining: Iterator[Any], chunk: DistributedDataParallel) -> tuple[torch.Tensor, Callable | None]:
            stage = unwrap_model(chunk)
            out = chunk(stage.local_row(next(remaining), batch.step, batch.training), objective)
            if isinstance(out, torch.Tensor):
                return out, None
            none = torch.zeros((), dtype=torch.int, device=out.losses["model"].device)
            return out.losses["model"], lambda loss: (loss, none, out.metrics)

        return self._microbatches.run(step, self.chunks, rows, forward_only=not batch.training)


def _finalize(chunks: list[DistributedDataParallel], _tokens: Any = None, **options: Any) -> None:
    """Sum the gradients of a step over the ranks that hold a parameter."""
    for chunk in chunks:
        unwrap_model(chunk).sum_shared_gradients()
    finalize_model_grads(chunks, None, **options)
