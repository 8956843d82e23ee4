"""What a run minimises: one contract for every network and both engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Number = torch.Tensor | float
Metric = tuple[Number, Number | None]
"""(sum, weight): logged is the sum over the rows of the global batch, divided by that of the weights. A weight of None
says that the sum is already divided by the global batch's weight; it is then added up in the order and precision of the
loss itself."""


@dataclass(frozen=True)
class GlobalBatch:
    """What is known of a global batch before its rows are gone over."""

    weight: float
    """Sum of :meth:`NetworksObjective.weight` over its rows, at least 1. Dividing by it, known before the step, makes
    the sum over rows, ranks and micro-batches the mean, however they are divided."""
    step: int
    """Steps done. With the recipe's seed it decides what is drawn at random, the same on all ranks where the draw must
    not depend on the layout."""
    training: bool
    """False of held-out rows: nothing random, no gradients."""


@dataclass
class Outcome:
    """What a row of the global batch gave."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Network -> scalar to minimise, divided by the global batch's weight: over its rows they add up. A network without
    one does not step. The Megatron engine has one network, `model`."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Name -> (sum, weight), ``loss`` among them. Every row names the same; one with nothing to say gives (0, 0)."""


class Forward(Protocol):
    """What an engine offers an objective that asks frozen models."""

    def forward(
        self, frozen: Sequence[torch.nn.Module], rows: Sequence[Any], read: Callable[..., dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """Run a frozen model over rows, in the layout of the run and without gradients. Collective.

        Args:
            frozen: its parts on this rank, as the network's spec built them.
            rows: of this data rank.
            read: (model, its output, row) -> what is kept of a row. On the Megatron engine it is called as an
                objective is, on the last pipeline stage, with hidden states; on the ZeRO engine with what the model's
                ``forward(row)`` returns.

        Returns:
            what `read` gave of each row, on every pipeline stage.
        """
        ...

    def on_device(self, *modules: torch.nn.Module) -> AbstractContextManager[None]:
        """Have frozen modules on this rank's device meanwhile, whose weights else wait in the host's memory."""
        ...


class NetworksObjective(ABC):
    """What one network, or several beside each other, learn from their rows, on the ZeRO engine."""

    @abstractmethod
    def weight(self, row: Any) -> float:
        """Weight of a row in the global batch: tokens with a loss, crops."""

    def tokens(self, row: Any) -> float:
        """Tokens of a row without padding, as the run counts them."""
        return float((~row.padding).sum())

    def prepare(self, engine: Forward, rows: list) -> list:
        """Rows with what frozen models say of them in their ``prepared``; called before the step's forward passes.

        Args:
            engine: runs frozen models.
            rows: this data rank's, equal on the ranks of one model group.
        """
        return rows

    @abstractmethod
    def run(self, networks: Mapping[str, Any], row: Any, batch: GlobalBatch) -> Outcome:
        """Go over a row with whole networks.

        Args:
            networks: name -> network, wrapped by DeepSpeed: call these. A loss reaches the parameters of its own
                network only. What looks through another network calls its ``.module``, and takes the gradient of what
                went in with ``torch.autograd.grad``, which leaves none in that network.
            row: whole, on this rank's device.
            batch: the global batch that the row is of.
        """

    def after_step(self, step: int) -> dict[str, float]:
        """Whatever follows an optimizer step on every rank; metrics to log."""
        return {}

    def after_skipped_step(self) -> None:
        """Whatever follows instead where a loss or gradient was not finite: forget what the rows left behind."""
        return


class Objective(NetworksObjective):
    """What one network learns from its rows, on either engine."""

    @abstractmethod
    def __call__(self, model: Any, hidden: Any, row: Any, batch: GlobalBatch) -> Outcome:
        """The losses and metrics of a row.

        Args:
            model: the last pipeline stage's part; on the ZeRO engine the network, wrapped by DeepSpeed.
            hidden: its output of the row: hidden states (S, 1, H), or what the network's ``forward(row)`` returns.
            row: this rank's part of it.
            batch: the global batch that the row is of.
        """

    def run(self, networks: Mapping[str, Any], row: Any, batch: GlobalBatch) -> Outcome:
        """See :class:`NetworksObjective`."""
        ((_, model),) = networks.items()
        return self(model, model(row), row, batch)
