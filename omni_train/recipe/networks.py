"""Table of what recipes know of networks: the networks of the package and of plug-ins register here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from omni_train import plugins
from omni_train.errors import UserError
from omni_train.recipe.keys import described
from omni_train.recipe.schema import EngineName, ModelConfig, Recipe


@dataclass(frozen=True, kw_only=True)
class NetworkKeys:
    """Description of a network as far as recipes need it."""

    name: str
    """The value of ``network=``."""
    engines: tuple[EngineName, ...]
    """Engines that can train it."""
    rows: str
    """Kind of rows that it is trained on, a value of ``data.rows``."""
    parts: tuple[str, ...]
    """Parts of ``model`` that it needs."""
    optional_parts: tuple[str, ...] = ()
    """Parts of ``model`` that it may have."""
    holds: tuple[str, ...] | None = None
    """Parts of ``model`` that its checkpoints hold, of those that it has; None for all."""
    settings: tuple[str, ...] = ()
    """Groups of keys in the schema that are for this network and others that list them."""
    keys: Mapping[str, type] = field(default_factory=dict)
    """Groups that it adds to the recipe: ``model.PART`` (by default null), ``GROUP`` or ``GROUP.NAME`` -> dataclass
    with keys, see `recipe.keys`."""
    check: Callable[[Recipe], None]
    """Function that refuses recipes that cannot work, with a UserError of one line."""

    def validate(self, recipe: Recipe) -> None:
        """Refuse a recipe that cannot work with this network.

        Raises:
            UserError: the first thing found, in one line.
        """
        self.check(recipe)


_TABLE: dict[str, NetworkKeys] = {}


def register(network: NetworkKeys) -> None:
    """Add a network to the table, and its keys to the recipe's.

    Raises:
        ValueError: there is another network of this name, one of its groups has a name that is taken, or it has a part
            that no model has.
    """
    for group, schema in network.keys.items():
        if group in described(Recipe) or any(one.keys.get(group, schema) is not schema for one in _TABLE.values()):
            raise ValueError(f"network {network.name}: the recipe has a {group} already")
    for part in (*network.parts, *network.optional_parts):
        if f"model.{part}" not in described(Recipe) and f"model.{part}" not in network.keys:
            raise ValueError(
                f"network {network.name}: there is no model.{part}; name a part of a model, or add it to keys"
            )
    if _TABLE.setdefault(network.name, network) is not network:
        raise ValueError(f"a network of the name {network.name} is registered already")


def network_of(name: str) -> NetworkKeys:
    """Network that a recipe's ``network`` names.

    Raises:
        UserError: there is no network of this name.
    """
    networks = registered()
    if name not in networks:
        raise UserError(f"network={name}: no such network; choose one of {', '.join(networks)}")
    return networks[name]


def held(recipe: Recipe) -> ModelConfig:
    """The recipe's model without the parts that checkpoints of its network do not hold."""
    holds = network_of(recipe.network).holds
    if holds is None:
        return recipe.model
    parts = {name for name, entry in described(type(recipe.model)).items() if entry.group and "." not in name}
    return replace(recipe.model, **dict.fromkeys(parts - {*holds}))


def registered() -> Mapping[str, NetworkKeys]:
    """Registered networks by name: the package's own, and those that plug-ins add."""
    importlib.import_module("omni_train.networks")  # by name, as that package imports this one
    plugins.load()
    return _TABLE


def unused_groups(network: str) -> list[str]:
    """Dotted names of the groups of keys for other networks: a run of this one neither prints nor checks them."""
    mine, all_of_them = network_of(network), registered().values()
    added = {group for one in all_of_them for group in one.keys}
    own = {name for name, entry in described(ModelConfig).items() if entry.group and "." not in name}
    parts = {f"model.{part}" for part in own} | {group for group in added if group.startswith("model.")}
    settings = {group for one in all_of_them for group in one.settings} | (added - parts)
    if EngineName.deepspeed not in mine.engines:
        settings.add("zero")
    used = {f"model.{part}" for part in (*mine.parts, *mine.optional_parts)} | {*mine.settings, *mine.keys}
    return sorted((parts | settings) - used)


def in_groups(key: str, groups: Iterable[str]) -> bool:
    """Whether a dotted key is one of these groups, or within one."""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)
