"""What is known of gradients while autograd gives them, before anyone's optimizer takes them away.

Watch a network before it is wrapped.
"""

from __future__ import annotations

import math

import torch

from omni_train import platform
from omni_train.training.optimizer import Named


class Finite:
    """Whether the gradients of a step, as each rank made them, are finite."""

    def __init__(self, named: Named) -> None:
        self._total = torch.zeros((), device=platform.device())
        for _, parameter in named:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        # A square that overflows is one that the optimizer would refuse too.
        self._total += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()

    def begin_step(self) -> None:
        """Forget those of the step before."""
        self._total.zero_()

    def everywhere(self) -> bool:
        """Whether those since :meth:`begin_step` are, on all ranks. Collective."""
        torch.distributed.all_reduce(self._total)
        return math.isfinite(self._total)
