"""The contract of the two engines with the training loop."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.checkpoint.store import Store
from omni_train.data.samples.strata import left_out_reasons
from omni_train.evaluation.base import Evaluated
from omni_train.frozen.offload import Offload
from omni_train.networks.base import NetworkSpec, spec_of
from omni_train.objectives.base import NetworksObjective
from omni_train.recipe.schema import Recipe, StratumConfig


@dataclass
class GlobalSums:
    """Sums over the rows of a global batch, known before the step."""

    weight: float
    tokens: float
    samples: int
    skipped: int
    tokens_by_modality: dict[str, float]
    strata: dict[str, int]
    left_out: dict[str, int]


@dataclass
class StepResult:
    """Result of one optimizer step, equal on every rank."""

    metrics: dict[str, float] = field(default_factory=dict)  # loss, grad_norm, and what objective and router add
    tokens: float = 0.0  # of the global batch, padding excluded
    samples: int = 0  # that begin in the global batch, not in an earlier one
    skipped: int = 0  # refused by the loaders while they made it
    updated: bool = True  # False where a non-finite loss or gradient made the step be skipped
    tokens_by_modality: dict[str, float] = field(default_factory=dict)
    strata: dict[str, int] = field(default_factory=dict)  # stratum -> samples that begin in the global batch
    left_out: dict[str, int] = field(default_factory=dict)  # by data.strata: reason -> samples

    @classmethod
    def of(cls, sums: GlobalSums, metrics: dict[str, float], updated: bool) -> StepResult:
        """Result of a step over a global batch of these sums."""
        counts = {name: value for name, value in vars(sums).items() if name != "weight"}
        return cls(metrics, updated=updated, **counts)


class Engine(ABC):
    """A network with its optimizer on this rank. Process groups must exist.

    Args:
        recipe: a validated recipe.
    """

    spec: NetworkSpec
    objective: NetworksObjective
    parameters: int
    """Parameters of the whole network."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.spec = spec_of(recipe.network)
        self.frozen = self.spec.frozen(recipe)
        self._offload = Offload()
        if recipe.frozen.offload:
            for model in self.frozen.values():
                self._offload.to_host(model.modules)

    @abstractmethod
    def open_store(self, directory: Path) -> Store:
        """Store of the run's checkpoints.

        Args:
            directory: the run's directory of checkpoints.
        """

    @abstractmethod
    def initialize(self, store: Any) -> None:
        """Initialize the parameters as the recipe's `init_from` and `init_parts` say. Collective."""

    @abstractmethod
    def resume(self, store: Any, checkpoint: Path) -> dict:
        """Load a checkpoint of this run; returns the `progress` that it was saved with. Collective."""

    @abstractmethod
    def save(self, store: Any, step: int, progress: dict, loader_state: Any) -> None:
        """Write a checkpoint, or start to. Collective.

        Args:
            store: from :meth:`open_store`.
            step: optimizer steps done.
            progress: state of the trainer; equal on all ranks.
            loader_state: state of this data rank's loader, None on ranks that do not load.
        """

    @abstractmethod
    def train_step(self, rows: list, learning_rate: float, step: int = 0) -> StepResult:
        """One optimizer step over a global batch.

        Args:
            rows: this data rank's rows of the batch; equal on the ranks of one model group, and as many on every rank.
            learning_rate: learning rate of this step, before the factors of parameter groups.
            step: number of steps done, which with the recipe's seed decides what is drawn at random.
        """

    @abstractmethod
    def evaluate(self, rows: list) -> dict[str, float]:
        """Metrics of held-out rows over all data ranks, named as in training. Collective."""

    @abstractmethod
    def network(self) -> Any:
        """The network for evaluation: whole, unwrapped, with averaged weights where they are kept. Collective."""

    @abstractmethod
    def forward(
        self, frozen: Sequence[torch.nn.Module], rows: Sequence[Any], read: Callable[..., dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """See :class:`omni_train.objectives.base.Forward`."""

    def prepared(self, rows: list) -> list:
        """Rows as the objective prepares them.

        Raises:
            RuntimeError: it returned fewer or more: the batch would be another than its weight says.
        """
        found = self.objective.prepare(self, rows)
        if len(found) != len(rows):
            name = type(self.objective).__name__
            raise RuntimeError(f"{name}.prepare returned {len(found)} rows of {len(rows)}; it must return each")
        return found

    def evaluation(self, held_out: list, refused: Counter[str]) -> Callable[[], Evaluated]:
        """The network's evaluation on held-out data, to be called whenever one is due.

        Args:
            held_out: held-out data of this data rank, as the network's kind of rows reads them.
            refused: how many samples could not be read, by reason.
        """
        assert self.spec.evaluation is not None, "validation refuses evaluation.every of this network"
        evaluate = self.spec.evaluation(self.recipe, held_out, refused, self.frozen)

        def run() -> Evaluated:
            with self.on_device(*(module for model in self.frozen.values() for module in model.modules)):
                return evaluate(self.network())

        return run

    def flops(self, rows: list) -> float:
        """FLOPs of one training step over this data rank's rows."""
        return self.spec.flops(self.recipe, rows, sum(map(self.objective.tokens, rows)), self.parameters)

    def expert_loads(self) -> dict[int, list[float]]:
        """Layer -> load of each of its experts in the last global batch, 1 being an even share; {} without experts.

        Collective.
        """
        return {}

    @contextmanager
    def on_device(self, *modules: torch.nn.Module) -> Iterator[None]:
        """See :class:`omni_train.objectives.base.Forward`."""
        with self._offload.on_device(modules):
            yield

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds beside the model."""


def global_sums(
    objective: NetworksObjective, rows: Sequence[Any], group: Any = None, strata: Sequence[StratumConfig] = ()
) -> GlobalSums:
    """Sums over the rows of all data ranks. Collective.

    Args:
        objective: says what weight and how many tokens a row has.
        rows: rows of this data rank.
        group: process group of the data ranks; None for all ranks.
        strata: ``data.strata``, by which the rows count samples.
    """
    modalities, drawn, reasons = rows[0].MODALITIES, [stratum.name for stratum in strata], left_out_reasons(strata)
    ends = list(itertools.accumulate((4, len(modalities), len(drawn), len(reasons))))
    # In fp64: 64 rows of 262,144 tokens are as many as fp32 can count.
    sums = torch.zeros(ends[-1], dtype=torch.float64)
    for row in rows:
        sums[:2] += torch.tensor([objective.weight(row), objective.tokens(row)], dtype=torch.float64)
        sums[2:4] += torch.tensor([row.samples, sum(row.skipped.values())])
        sums[ends[0] : ends[1]] += row.tokens_by_modality()
        sums[ends[1] : ends[2]] += torch.tensor([row.strata.get(name, 0) for name in drawn])
        sums[ends[2] : ends[3]] += torch.tensor([row.left_out.get(reason, 0) for reason in reasons])
    sums = sums.to(platform.device())
    torch.distributed.all_reduce(sums, group=group)
    weight, tokens, samples, skipped, *counts = sums.tolist()
    by_modality, counts = counts[: len(modalities)], list(map(int, counts[len(modalities) :]))
    return GlobalSums(
        weight,
        tokens,
        int(samples),
        int(skipped),
        dict(zip(modalities, by_modality, strict=True)),
        dict(zip(drawn, counts, strict=False)),
        dict(zip(reasons, counts[len(drawn) :], strict=True)),
    )
