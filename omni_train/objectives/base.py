"""Objectives, what runs minimise: one contract for every network and both engines."""

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
    """Facts about a global batch that are known before its forward passes."""

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
    """Losses and metrics of one row of the global batch."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Network -> scalar to minimise, divided by the global batch's weight: over its rows they add up. A network without
    one does not step. The Megatron engine has one network, `model`."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Name -> (sum, weight), ``loss`` among them. Every row names the same; one with nothing to say gives (0, 0)."""


class Forward(Protocol):
    """Forward passes of frozen models, which an engine offers to an objective that needs their outputs."""

    def forward(
        self, frozen: Sequence[torch.nn.Module], rows: Sequence[Any], read: Callable[..., dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """Outputs of a frozen model over rows, in the layout of the run and without gradients. Collective.

        Args:
            frozen: the model's parts on this rank, as the network's spec built them.
            rows: rows of this data rank.
            read: (model, its output, row) -> tensors to keep of a row. On the Megatron engine it is called as an
                objective is, on the last pipeline stage, with hidden states; on the ZeRO engine with what the model's
                ``forward(row)`` returns.

        Returns:
            what `read` returned for each row, on every pipeline stage.
        """
        ...

    def on_device(self, *modules: torch.nn.Module) -> AbstractContextManager[None]:
        """Context in which frozen modules are on this rank's device; outside it they may be in the host's memory."""
        ...


class NetworksObjective(ABC):
    """Objective of one network, or of several that are trained together, on the ZeRO engine."""

    @abstractmethod
    def weight(self, row: Any) -> float:
        """Weight of a row in the global batch: its tokens with a loss, its crops, or the like."""

    def tokens(self, row: Any) -> float:
        """Tokens of a row without padding, as the run counts them."""
        return float((~row.padding).sum())

    def prepare(self, engine: Forward, rows: list) -> list:
        """Rows with outputs of frozen models in their ``prepared``; called before the step's forward passes.

        Args:
            engine: runs frozen models.
            rows: rows of this data rank, equal on the ranks of one model group.
        """
        return rows

    @abstractmethod
    def run(self, networks: Mapping[str, Any], row: Any, batch: GlobalBatch) -> Outcome:
        """Losses and metrics of a row, by forward passes of whole networks.

        Args:
            networks: name -> network, wrapped by DeepSpeed: call these. A loss must reach the parameters of its own
                network only: a gradient through another network is taken by calling its ``.module`` and
                ``torch.autograd.grad``, which leaves none in that network.
            row: the whole row, on this rank's device.
            batch: the global batch that the row is of.
        """

    def after_step(self, step: int) -> dict[str, float]:
        """Hook after an optimizer step, called on every rank; returns metrics to log."""
        return {}

    def after_skipped_step(self) -> None:
        """Hook after a step that was skipped for a non-finite loss or gradient: forget what its rows left behind."""
        return


class Objective(NetworksObjective):
    """Objective of one network, on either engine."""

    @abstractmethod
    def __call__(self, model: Any, hidden: Any, row: Any, batch: GlobalBatch) -> Outcome:
        """Losses and metrics of a row.

        Args:
            model: the last pipeline stage of the model; on the ZeRO engine the network, wrapped by DeepSpeed.
            hidden: its output for the row: hidden states (S, 1, H), or what the network's ``forward(row)`` returns.
            row: this rank's part of the row.
            batch: the global batch that the row is of.
        """

    def run(self, networks: Mapping[str, Any], row: Any, batch: GlobalBatch) -> Outcome:
        """See :class:`NetworksObjective`."""
        ((_, model),) = networks.items()
        return self(model, model(row), row, batch)
