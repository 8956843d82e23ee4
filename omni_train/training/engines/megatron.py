"""The Megatron engine: one optimizer step over a global batch of rows, in any parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from omni_train import platform
from omni_train.checkpoint.sharded import CheckpointStore
from omni_train.checkpoint.start import initialize
from omni_train.data.rows.batch import MODALITIES, PackedBatch
from omni_train.models.audio_encoder import drawn_window
from omni_train.models.row import LocalRow
from omni_train.models.thinker import build_chunks
from omni_train.models.thinker.flops import step_flops
from omni_train.nn import balance
from omni_train.objectives.language_modelling import LanguageModelling
from omni_train.recipe.schema import OptimizerName, Recipe
from omni_train.training.engines.gradients import Arrivals
from omni_train.training.engines.muon import mark_matrices
from omni_train.training.engines.optimizer import build_optimizer, freeze, guarded_step, set_learning_rate


@dataclass
class StepResult:
    """What one optimizer step did, equal on every rank."""

    metrics: dict[str, float] = field(default_factory=dict)  # loss, grad_norm, and what objective and router add
    tokens: float = 0.0  # of the global batch, padding excluded
    samples: int = 0  # that begin in the global batch
    skipped: int = 0  # refused by the loaders while they made it
    updated: bool = True  # False where a non-finite loss or gradient made the step be skipped
    tokens_by_modality: list[float] = field(default_factory=list)  # in the order of MODALITIES


@dataclass
class GlobalSums:
    """What is known of a global batch before the step."""

    tokens: list[float]  # by modality, padding excluded
    weights: list[float]  # of the loss, by modality
    samples: int  # that begin in it
    skipped: int  # refused while it was made


class MegatronEngine:
    """Model, optimizer and step on Megatron's schedules. Process groups must exist."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.objective = LanguageModelling(recipe.loss_chunk_tokens, recipe.model.thinker.mtp_loss_weight)
        modules = build_chunks(recipe)
        named = [pair for module in modules for pair in module.global_parameters()]
        freeze(named, recipe.trainable)
        self._arrivals: Arrivals | None = Arrivals(named)
        if recipe.optimizer.name is OptimizerName.muon:
            for module in modules:
                mark_matrices(module)
        self.config = modules[0].config
        self.seq_length = recipe.data.row_tokens * (2 if modules[0].carries_embeddings else 1)  # between the stages
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
        self.config.finalize_model_grads_func = lambda model, _tokens=None, **options: finalize_model_grads(
            model, None, **options
        )
        self.optimizer = build_optimizer(recipe, self.chunks, named)
        self._run = get_forward_backward_func()
        self._audio_window_frames = 0

    def open_store(self, directory: Path) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(directory, self.recipe.checkpoint, self.recipe.model)

    def initialize(self, store: CheckpointStore) -> None:
        """Start as the recipe's `init_from` and `init_parts` say, or fresh."""
        if self.recipe.init_from or self.recipe.init_parts:
            start = initialize(self.chunks, self.recipe)
            if start is not None:
                store.carry_from(start)
            self.optimizer.reload_model_params()

    def resume(self, store: CheckpointStore, checkpoint: Path) -> dict:
        """Go on from a checkpoint of this run; what the trainer had to remember."""
        return store.load(checkpoint, self.chunks, self.optimizer)

    def save(self, store: CheckpointStore, step: int, progress: dict, loader_state) -> None:
        """Start writing a checkpoint. Collective."""
        store.save(step, self.chunks, self.optimizer, progress, loader_state)

    def flops(self, rows: list[PackedBatch]) -> float:
        """Of a step over these rows."""
        return step_flops(self.recipe.model, rows)

    def evaluation(self, feed):
        """What answers held-out questions: a call returns figures and this rank's predictions that are to be shown."""
        from omni_train.evaluation.answers import Evaluation  # which reads files: the step needs none

        run = Evaluation(self.recipe, *feed.questions())
        return lambda: run(self.chunks[0])

    def close(self) -> None:
        """Nothing is held beside the model."""

    def _global_sums(self, rows: list[PackedBatch]) -> GlobalSums:
        """Summed over the data ranks alone: the other ranks of a model group hold the same rows."""
        # In fp64: 64 rows of 262,144 tokens are as many as fp32 can count.
        tokens, weights, counts = (torch.zeros(n, dtype=torch.float64) for n in (len(MODALITIES), len(MODALITIES), 2))
        for row in rows:
            modality = row.modality.long()
            tokens.index_add_(0, modality, (~row.padding).double())
            weights.index_add_(0, modality, row.loss_weights.double())
            counts += torch.tensor([row.samples, sum(row.skipped.values())])
        sums = torch.cat([tokens, weights, counts]).to(platform.device())
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        tokens, weights, counts = sums.cpu().split([len(MODALITIES), len(MODALITIES), 2])
        return GlobalSums(tokens.tolist(), weights.tolist(), *(int(count) for count in counts))

    def _forward_step(self, rows, chunk):
        row = LocalRow.from_batch(
            next(rows), media=get_attr_wrapped_model(chunk, "senses"), audio_window_frames=self._audio_window_frames
        )
        out = chunk(row, self.objective)
        if isinstance(out, tuple):
            loss, sums = out
            return loss, lambda loss: (loss, torch.zeros((), dtype=torch.int, device=loss.device), sums)
        return out, None

    def _schedule(self, rows: list[PackedBatch], sums: GlobalSums, forward_only: bool) -> dict[str, float]:
        """Run the micro-batches; the objective over the global batch, equal on every rank."""
        self.objective.batch_weight = max(sum(sums.weights), 1.0)
        iterators = [iter(rows) for _ in self.chunks]
        stored = self._run(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(rows),
            seq_length=self.seq_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        names = ["loss"] + (["mtp_loss"] if self.recipe.model.thinker.mtp_num_hidden_layers else [])
        totals = torch.zeros(len(names) + len(MODALITIES), device=platform.device())
        for one in stored:
            totals += torch.cat([*(one[name].float().view(1) for name in names), one["loss_by_modality"]])
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.recipe.parallel.pipeline > 1:
            torch.distributed.broadcast(
                totals,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        values = totals.tolist()
        metrics = dict(zip(names, values, strict=False))
        if self.recipe.model.audio or self.recipe.model.vision:
            for name, weight, total in zip(MODALITIES, sums.weights, values[len(names) :], strict=True):
                if weight > 0:
                    metrics[f"loss_{name}"] = total / weight
        return metrics

    def train_step(self, rows: list[PackedBatch], learning_rate: float, step: int = 0) -> StepResult:
        """One optimizer step.

        Args:
            rows: this data rank's rows of the global batch; equal on the ranks of one model group.
            learning_rate: of this step.
            step: number of steps done, which with the recipe's seed decides what is drawn at random.
        """
        sums = self._global_sums(rows)
        if self.recipe.model.audio:
            self._audio_window_frames = drawn_window(self.recipe.model.audio, self.recipe.seed, step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        balance.begin_step(self.chunks, self.recipe.model.thinker.router_aux_loss_coef, sum(sums.tokens))
        metrics = self._schedule(rows, sums, forward_only=False)
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
        return StepResult(metrics, sum(sums.tokens), sums.samples, sums.skipped, updated, sums.tokens)

    def expert_loads(self) -> dict[int, list[float]]:
        """See :func:`omni_train.nn.balance.loads`. Collective."""
        return balance.loads(self.chunks, parallel_state.get_pipeline_model_parallel_group())

    @torch.no_grad()
    def evaluate(self, rows: list[PackedBatch]) -> dict[str, float]:
        """Objective of held-out rows, mean per token over all data ranks."""
        if self.recipe.model.audio:
            self._audio_window_frames = self.recipe.model.audio.eval_window_frames
        for chunk in self.chunks:
            chunk.eval()
        metrics = self._schedule(rows, self._global_sums(rows), forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        return metrics
