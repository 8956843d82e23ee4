"""Metrics of a global batch from those of its rows, over all ranks; engines need not know the names of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from omni_train import platform
from omni_train.objectives.base import Metric

_OF_THE_RUN = {"step", "lr", "tokens", "grad_norm"}


class Totals:
    """Sums of metrics over rows and ranks.

    Args:
        precision: dtype of the sums while a rank adds them up, row after row.
        ranks: process group of the ranks that have different rows, or parts of them.
        pipeline: process group of the pipeline ranks, of which the last has metrics and sends them to the others; None
            where each rank has them.
    """

    def __init__(self, precision: torch.dtype, ranks: Any = None, pipeline: Any = None) -> None:
        self.precision, self.ranks = precision, ranks
        self.pipeline = pipeline if pipeline is not None and pipeline.size() > 1 else None
        self._names: dict[bool, list[tuple[str, bool]]] = {}  # by `training`: (name, whether it has a weight)

    def over(self, rows: Sequence[Mapping[str, Metric]], training: bool) -> dict[str, float]:
        """Metrics over the global batch, without those whose weight is 0. Collective.

        Args:
            rows: metrics of this rank's rows; none on pipeline ranks before the last.
            training: whether they are of a training step: held-out rows may have other metrics.

        Raises:
            RuntimeError: the rows of a batch name different metrics.
        """
        last = self.pipeline is None or self.pipeline.rank() == self.pipeline.size() - 1
        names = self._agreed(rows if last else (), training)
        sums = torch.zeros(len(names), dtype=self.precision, device=platform.device())
        weights = torch.zeros(len(names), dtype=torch.float64, device=platform.device())
        none = torch.zeros(
            (), dtype=torch.float64, device=weights.device
        )  # made there: a number would have to get there
        for row in rows if last else ():
            pairs = [row[name] for name, _ in names]
            sums += torch.stack([torch.as_tensor(total).to(sums) for total, _ in pairs])
            weights += torch.stack(
                [none if weight is None else torch.as_tensor(weight).to(none) for _, weight in pairs]
            )
        totals = torch.cat([sums.double(), weights])
        torch.distributed.all_reduce(totals, group=self.ranks)
        if self.pipeline is not None:
            source = torch.distributed.get_global_rank(self.pipeline, self.pipeline.size() - 1)
            torch.distributed.broadcast(totals, src=source, group=self.pipeline)
        reduced, weighed = totals[: len(names)].to(self.precision).tolist(), totals[len(names) :].tolist()
        return {
            name: total / weight if has_weight else total
            for (name, has_weight), total, weight in zip(names, reduced, weighed, strict=True)
            if weight or not has_weight
        }

    def _agreed(self, rows: Sequence[Mapping[str, Metric]], training: bool) -> list[tuple[str, bool]]:
        """(name, whether it has a weight) of each metric, which pipeline ranks before the last learn once."""
        kinds = [[(name, weight is not None) for name, (_, weight) in row.items()] for row in rows]
        if training not in self._names:
            told: list = [kinds[0] if kinds else []]
            if self.pipeline is not None:
                source = torch.distributed.get_global_rank(self.pipeline, self.pipeline.size() - 1)
                torch.distributed.broadcast_object_list(told, src=source, group=self.pipeline)
            self._names[training] = told[0]
            said = {name for name, _ in told[0]}
            if training and "loss" not in said:
                raise RuntimeError(f"the objective's metrics are {sorted(said)}; loss must be among them")
            if taken := said & _OF_THE_RUN:
                raise RuntimeError(f"the objective has a metric {min(taken)}, which the run logs itself; rename it")
        names = self._names[training]
        if other := next((kind for kind in kinds if kind != names), None):
            raise RuntimeError(f"rows name different metrics: {dict(names)} and {dict(other)}")
        return names
