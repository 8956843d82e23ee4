"""Dataclasses of the recipe, extended by the keys that networks add."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any

from omni_train.recipe.keys import described, key
from omni_train.recipe.networks import registered
from omni_train.recipe.schema import ModelConfig, Recipe


def recipe_type() -> type[Recipe]:
    """Class of recipes: :class:`Recipe` with the groups of all registered networks, itself where they add none."""
    added = {group: schema for network in registered().values() for group, schema in network.keys.items()}
    return _extended(Recipe, "", tuple(sorted(added.items(), key=lambda one: one[0])))


def model_type() -> type[ModelConfig]:
    """Class of models: :class:`ModelConfig` with the parts of all registered networks."""
    return _type_of("model")


def _type_of(group: str) -> type:
    if not group:
        return recipe_type()
    found = described(recipe_type())[group].group
    assert found is not None, f"{group} is a key"
    return found


@cache
def _extended(schema: type, group: str, added: tuple[tuple[str, type], ...]) -> type:
    """Dataclass of a group with further dataclasses in it.

    Args:
        schema: the group's dataclass.
        group: dotted name of the group.
        added: (dotted name within the group, dataclass) of each.
    """
    if not added:
        return schema
    replaced: list[tuple[str, Any, Any]] = []
    for own in fields(schema):
        inner = tuple((name.partition(".")[2], kind) for name, kind in added if name.startswith(f"{own.name}."))
        if inner:
            kind = _extended(described(schema)[own.name].group, f"{group}.{own.name}".strip("."), inner)
            replaced.append((own.name, kind, field(default_factory=kind, metadata=own.metadata)))
    for name, kind in added:
        if "." not in name:
            part = group == "model"  # which a model may lack
            replaced.append((name, kind | None if part else kind, key(None if part else kind)))

    def reduce(self: Any) -> tuple:
        return _rebuilt, (group, vars(self))

    namespace = {"__doc__": schema.__doc__, "__reduce__": reduce}
    return make_dataclass(schema.__name__, replaced, bases=(schema,), namespace=namespace, module=schema.__module__)


def _rebuilt(group: str, values: dict) -> Any:
    """Instance of an extended dataclass from its pickle, which cannot name a class that no module has."""
    found: Any = object.__new__(_type_of(group))
    vars(found).update(values)
    return found
