"""Specification of a network: how it is built, its objective, its evaluation and its FLOPs."""

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
"""Networks by name. On the Megatron engine ``model`` alone, a list of this rank's pipeline stages
(:class:`omni_train.models.stage.PipelineStage`); on the ZeRO engine whole networks, each with an optimizer and a state
in the checkpoint of its own."""
Frozen = Mapping[str, Any]
"""Frozen models by name, each an :class:`omni_train.frozen.offload.FrozenModel`."""


def no_frozen_models(recipe: Recipe) -> dict[str, FrozenModel]:
    """No frozen models: the default of a network."""
    return {}


def as_it_says(recipe: Recipe) -> Recipe:
    """The recipe itself: a network starts as `init_from` and `init_parts` say, by default."""
    return recipe


def six_per_parameter(recipe: Recipe, rows: Sequence[Any], tokens: float, parameters: int) -> float:
    """FLOPs of one training step, estimated as six per parameter and token (Kaplan et al. 2020, section 2.1)."""
    return 6.0 * parameters * tokens


@dataclass(frozen=True, kw_only=True)
class NetworkSpec(NetworkKeys):
    """All that is special about a network. Heavy packages are imported by the functions that need them.

    Attributes:
        build: (recipe, frozen) -> fresh networks on this rank's device, the same on every rank.
        objective: (recipe, networks, frozen) -> the objective that they minimise.
        frozen: recipe -> frozen models beside the network. Collective.
        evaluation: (recipe, held-out data as the network's kind of rows reads them, how many samples could not be read
            by reason, frozen) -> the evaluation on them; None where the network has no evaluation.
        starting: recipe -> recipe with what a fresh run of the network starts from beside what it says.
        flops: (recipe, rows, their tokens, parameters of the whole network) -> FLOPs of a training step over the rows.
    """

    build: Callable[[Recipe, Frozen], Networks]
    objective: Callable[[Recipe, Networks, Frozen], NetworksObjective]
    frozen: Callable[[Recipe], Frozen] = no_frozen_models
    evaluation: Callable[[Recipe, list, Counter[str], Frozen], Evaluation] | None = None
    starting: Callable[[Recipe], Recipe] = as_it_says
    flops: Callable[[Recipe, Sequence[Any], float, int], float] = six_per_parameter

    def validate(self, recipe: Recipe) -> None:
        """See :class:`NetworkKeys`."""
        if recipe.evaluation.every and self.evaluation is None:
            refuse(recipe, "evaluation.every", f"network={self.name} answers no questions; set 0")
        super().validate(recipe)


def spec_of(name: str) -> NetworkSpec:
    """Specification of the network that a recipe's ``network`` names.

    Raises:
        UserError: there is no network of this name.
    """
    found = network_of(name)
    assert isinstance(found, NetworkSpec), f"network={name} is registered without a spec"
    return found
