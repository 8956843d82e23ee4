"""Micro-batches through a model's parts on this rank, as Megatron's pipeline schedule orders them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from omni_train import platform
from omni_train.models.stage import PipelineStage
from omni_train.training.engines.stages import shared_by_stages


class Microbatches:
    """Runner of micro-batches, and without an engine :class:`omni_train.objectives.base.Forward` of frozen models that
    stay on the device. Process groups must exist.

    Args:
        row_tokens: of the recipe's rows.
    """

    def __init__(self, row_tokens: int) -> None:
        self._row_tokens = row_tokens
        self._run = get_forward_backward_func()

    def run(self, step: Callable, parts: Sequence[Any], rows: Sequence[Any], **options: bool) -> list:
        """Run a step over rows, each a micro-batch; returns what it gave on the last pipeline stage. Collective.

        Args:
            step: (rows that are left, part of the model) -> what Megatron's ``forward_step_func`` returns.
            parts: this rank's parts of the model, one or one per virtual stage.
            rows: rows of this data rank.
            options: of the schedule.
        """
        iterators = [iter(rows) for _ in parts]
        return self._run(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(parts) if len(parts) > 1 else parts[0],
            num_microbatches=len(rows),
            seq_length=unwrap_model(parts[0]).pipeline_tokens(self._row_tokens),
            micro_batch_size=1,
            **options,
        )

    @torch.no_grad()
    def forward(
        self, frozen: Sequence[torch.nn.Module], rows: Sequence[Any], read: Callable[..., dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """See :class:`omni_train.objectives.base.Forward`."""

        def step(remaining: Iterator[Any], stage: PipelineStage) -> tuple[torch.Tensor, Callable | None]:
            out = stage(stage.local_row(next(remaining), 0, training=False), read)
            if not isinstance(out, dict):
                return out, None
            return torch.zeros((), device=platform.device()), lambda _, non_loss_data: out

        found = self.run(step, frozen, rows, forward_only=True, collect_non_loss_data=True)
        return shared_by_stages(found, len(rows))

    def on_device(self, *modules: torch.nn.Module) -> AbstractContextManager[None]:
        """See :class:`omni_train.objectives.base.Forward`."""
        return nullcontext()
