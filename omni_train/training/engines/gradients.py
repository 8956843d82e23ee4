"""What is known of gradients while autograd gives them: whether each parameter gets one, and whether all are numbers.

Both are asked on every parameter as its gradient comes, before anyone's optimizer takes it away: watch a network before
it is wrapped.
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
    """Whether each parameter that is trained gets a gradient at all: one that does not would silently stay as it is.

    One of zeros counts, as that of an expert whom no token chose, or of an encoder in a batch without its media: the
    loss does depend on them. None comes where no path of the graph leads to the parameter.

    Args:
        named: parameters, by the names that they have in the whole model.
    """

    def __init__(self, named: Named) -> None:
        self._waiting = {parameter: name for name, parameter in named if parameter.requires_grad}
        self._names = set(self._waiting.values())
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in self._waiting]

    def _arrived(self, parameter: torch.nn.Parameter) -> None:
        self._waiting.pop(parameter, None)

    def check(self, step: int) -> None:
        """Stop watching, and refuse to go on where a parameter got no gradient on any rank that has it. Collective.

        Args:
            step: steps done before the one whose backward passes are over.

        Raises:
            UserError: naming some, the same on every rank.
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
