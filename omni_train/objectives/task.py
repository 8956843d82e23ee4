"""What the ZeRO engine trains: networks with an optimizer each, and what they minimise on a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Outcome:
    """What a row of the global batch gave."""

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    """Network -> scalar to minimise. Over the rows of the global batch they add up: each is already divided by the
    global batch's weight."""
    figures: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = field(default_factory=dict)
    """Metric -> (sum, weight), logged as the sums of all rows over their weights. ``loss`` must be among them. Every
    row names the same figures; one with nothing to say gives (0, 0)."""


class Task(ABC):
    """A network of the family as something to train.

    Attributes:
        networks: name -> module, on this rank's device, the same on every rank. Each has an optimizer and a state in
            the checkpoint of its own; one that is nobody's input, such as discriminators, is trained beside the others.
        teacher: a frozen network whose features they learn from; None: there is none.
    """

    networks: dict[str, torch.nn.Module]
    teacher: Any = None

    @abstractmethod
    def weight(self, row: Any) -> float:
        """What the row counts in the global batch: loss tokens, crops."""

    @abstractmethod
    def run(
        self, networks: Mapping[str, Callable], row: Any, total_weight: float, step: int, training: bool
    ) -> Outcome:
        """Go over one row of the global batch.

        Args:
            networks: as `self.networks`, wrapped by the engine: call these. A loss reaches the parameters of its own
                network only. What looks through another network calls its ``.module``, and takes the gradient of what
                went in with ``torch.autograd.grad``, which leaves none in that network.
            row: from the loader.
            total_weight: the sum of `weight` over the global batch.
            step: steps done; with the recipe's seed it decides what is drawn at random, the same on all ranks where the
                draw must not depend on the layout.
            training: False: held-out rows, nothing random, no gradients.
        """

    def tokens(self, row: Any) -> float:
        """What the row counts in the run's tokens: all but padding."""
        return float((~row.padding).sum())

    def after_step(self, networks: Mapping[str, torch.nn.Module], step: int) -> dict[str, float]:
        """Called on every rank after each optimizer step; figures to log."""
        return {}

    def after_skipped_step(self, networks: Mapping[str, torch.nn.Module]) -> None:
        """Called instead where a loss or gradient was not finite: forget what the rows left behind."""
        return
