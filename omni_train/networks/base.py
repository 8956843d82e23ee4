"""What the rooms above know of a network: how it is built, what it learns from, how it is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omni_train.recipe.networks import NetworkKeys, network_of
from omni_train.recipe.refusals import refuse
from omni_train.recipe.schema import Recipe

if TYPE_CHECKING:
    from omni_train.evaluation.base import Evaluation
    from omni_train.frozen.offload import FrozenModel
    from omni_train.objectives.base import NetworksObjective

Networks = Mapping[str, Any]
"""Name -> module. On the Megatron engine ``model`` alone, a list of this rank's pipeline stages
(:class:`omni_train.models.stage.PipelineStage`); on the ZeRO engine whole networks, each with an optimizer and a state
in the checkpoint of its own."""
Frozen = Mapping[str, Any]
"""Name -> :class:`omni_train.frozen.offload.FrozenModel`."""


def no_frozen_models(recipe: Recipe) -> dict[str, FrozenModel]:
    """None."""
    return {}


def six_per_parameter(recipe: Recipe, rows: Sequence[Any], tokens: float, parameters: int) -> float:
    """Forward and backward are six operations per parameter and token, roughly."""
    return 6.0 * parameters * tokens


@dataclass(frozen=True, kw_only=True)
class NetworkSpec(NetworkKeys):
    """All that is special about a network. What is heavy is imported by the functions that need it.

    Attributes:
        build: (recipe, frozen) -> fresh networks on this rank's device, the same on every rank.
        objective: (recipe, networks, frozen) -> what they minimise.
        frozen: recipe -> the models beside it that do not learn. Collective.
        evaluation: (recipe, held-out questions of the network's kind of rows, how many are left out by reason, frozen)
            -> what asks them; None: the network answers no questions.
        flops: (recipe, rows, their tokens, parameters of the whole network) -> operations of a training step over rows.
    """

    build: Callable[[Recipe, Frozen], Networks]
    objective: Callable[[Recipe, Networks, Frozen], NetworksObjective]
    frozen: Callable[[Recipe], Frozen] = no_frozen_models
    evaluation: Callable[[Recipe, list, Counter[str], Frozen], Evaluation] | None = None
    flops: Callable[[Recipe, Sequence[Any], float, int], float] = six_per_parameter

    def validate(self, recipe: Recipe) -> None:
        """See :class:`NetworkKeys`."""
        if recipe.evaluation.every and self.evaluation is None:
            refuse(recipe, "evaluation.every", f"network={self.name} answers no questions; set 0")
        super().validate(recipe)


def spec_of(name: str) -> NetworkSpec:
    """The network that a recipe's ``network`` means.

    Raises:
        UserError: there is none of this name.
    """
    found = network_of(name)
    assert isinstance(found, NetworkSpec), f"network={name} is registered without a spec"
    return found
