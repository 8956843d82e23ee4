"""Checks of gradients as autograd computes them: that each parameter gets one, and that all are finite.

Both are hooks on parameters, called before an optimizer takes the gradient away: make them before a network is wrapped.
"""

from __future__ import annotations

import math

import torch

from omni_train import platform
from omni_train.errors import UserError
from omni_train.training.engines.optimizer import Named

_NAMED = 3
"""Parameters without a gradient that the error names."""


class Arrivals:
    """Check that each trained parameter gets a gradient in the first step: without one it would silently not change.

    A gradient of zeros counts, as that of an expert that no token chose, or of an encoder in a batch without its media:
    the loss does depend on them. A parameter gets none where no path of the graph leads to it.

    Args:
        named: (name in the whole model, parameter) pairs.
    """

    def __init__(self, named: Named) -> None:
        self._waiting = {parameter: name for name, parameter in named if parameter.requires_grad}
        self._names = set(self._waiting.values())
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in self._waiting]

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        self._waiting.pop(parameter, None)

    def check(self, step: int) -> None:
        """Remove the hooks, and refuse to go on where a parameter got no gradient on any rank that has it. Collective.

        Args:
            step: steps done before the one whose backward passes are over.

        Raises:
            UserError: a parameter got none; the message names some, the same on every rank.
        """
        for hook in self._hooks:
            hook.remove()
        missing = set(self._waiting.values())
        everywhere: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, missing)
        doubtful = sorted(set().union(*everywhere))
        if not doubtful:
            return
        arrived = torch.tensor([name in self._names - missing for name in doubtful], dtype=torch.int32)
        arrived = arrived.to(platform.device())
        torch.distributed.all_reduce(arrived, op=torch.distributed.ReduceOp.MAX)
        lost = [name for name, here in zip(doubtful, arrived.tolist(), strict=True) if not here]
        if lost:
            more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
            raise UserError(
                f"step {step + 1}: no gradient comes to {len(lost)} of the parameters that are trained: "
                f"{', '.join(lost[:_NAMED])}{more}; the loss does not depend on them: leave them out of trainable"
            )


class Finite:
    """Check that the gradients of a step, as each rank computed them, are finite."""

    def __init__(self, named: Named) -> None:
        self._total = torch.zeros((), device=platform.device())
        for _, parameter in named:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        # A square that overflows is one that the optimizer would refuse too.
        self._total += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()

    def begin_step(self) -> None:
        """Forget the gradients of the step before."""
        self._total.zero_()

    def everywhere(self) -> bool:
        """Whether all gradients since :meth:`begin_step` are finite, on all ranks. Collective."""
        torch.distributed.all_reduce(self._total)
        return math.isfinite(self._total)
