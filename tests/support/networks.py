"""Networks made for a test, as a run finds them."""

from __future__ import annotations

from collections.abc import Callable

from omni_train.networks.base import NetworkSpec
from omni_train.recipe.networks import _TABLE
from omni_train.recipe.schema import EngineName


def lone_engine_network(name: str, objective: Callable, build: Callable, **options) -> str:
    """Register a network of the ZeRO engine; its name, for a recipe's ``network``.

    Args:
        name: registered again, it takes the place of the one before.
        objective: networks -> what they minimise.
        build: recipe -> networks.
        options: of its spec.
    """
    spec = NetworkSpec(
        name=name,
        engines=(EngineName.deepspeed,),
        rows="chats",
        parts=(),
        check=lambda recipe: None,
        build=lambda recipe, frozen: build(recipe),
        objective=lambda recipe, networks, frozen: objective(networks),
        **options,
    )
    _TABLE[name] = spec
    return name
