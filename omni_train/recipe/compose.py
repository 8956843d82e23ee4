"""Composition of a typed ``Recipe`` from the Hydra tree, and its ``recipe.yaml``, written and read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from yaml import YAMLError

from omni_train.errors import UserError
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.keys import described
from omni_train.recipe.messages import one_line
from omni_train.recipe.networks import unused_groups
from omni_train.recipe.old_names import recipe_of_today
from omni_train.recipe.schema import Recipe

CONFIG_NAME = "config"
PACKAGE = Path(__file__).resolve().parent.parent


def recipes_dir() -> Path:
    """Folder of the Hydra tree: ``omni_train/recipes`` of an installed wheel, else ``recipes`` of the source checkout.

    Raises:
        UserError: neither is there.
    """
    candidates = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
    for candidate in candidates:
        if (candidate / f"{CONFIG_NAME}.yaml").is_file():
            return candidate
    raise UserError(f"no recipes in {' or '.join(map(str, candidates))}; install omni_train again")


def to_recipe(config: DictConfig) -> Recipe:
    """Recipe of a composed configuration, in dataclasses and enums, interpolations resolved.

    Raises:
        UserError: a key is not in the schema, a mandatory key has no value, or an interpolation cannot be resolved.
    """
    try:
        # Merged onto the bare schema once more, because Hydra's `+key=value` adds keys past the schema's strictness.
        strict = OmegaConf.merge(OmegaConf.structured(recipe_type()), OmegaConf.to_container(config))
        recipe = OmegaConf.to_object(strict)
    except Exception as error:
        raise one_line(error) from error
    assert isinstance(recipe, Recipe)
    for group in unused_groups(recipe.network):
        if group.startswith("model."):
            setattr(recipe.model, group.removeprefix("model."), None)
    return recipe


def load_recipe(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Recipe:
    """Compose a recipe from the tree.

    Args:
        overrides: in Hydra's syntax, e.g. ``["stage=s2_general", "parallel.tensor=2"]``.
        config_dir: a folder of recipes of one's own, laid out like the tree, beside it.

    Raises:
        UserError: one line that names the key or option and what would be right.
    """
    with opened_tree(config_dir) as tree:
        return to_recipe(tree.compose(overrides))


def used(config: DictConfig) -> DictConfig:
    """Composed configuration without the groups that its network does not use.

    Raises:
        UserError: there is no such network.
    """
    return _without(config, unused_groups(config.network))


def _without(config: DictConfig, groups: Iterable[str]) -> DictConfig:
    shown = _plain(config)
    for group in groups:
        parent, _, name = group.rpartition(".")
        (shown[parent] if parent else shown).pop(name, None)
    return OmegaConf.create(shown)


def _plain(config: DictConfig) -> dict[Any, Any]:
    """A configuration as dictionaries and lists, nothing in it resolved."""
    found = OmegaConf.to_container(config)
    assert isinstance(found, dict)
    return found


class Tree:
    """Recipe tree, opened with Hydra. It composes, and starts nothing that a file or a word could name."""

    def __init__(self, hydra: Hydra, pure: bool) -> None:
        self.hydra = hydra
        self._own = None if pure else self._composed([])

    def compose(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Configuration that overrides compose.

        Raises:
            UserError: as :func:`load_recipe` raises it.
        """
        try:
            refuse_hydra_words(overrides)
            config = self._composed(overrides, mode)
            if self._own is not None:
                self._refuse_hydra_files(config.hydra, self._own.hydra)
        except UserError:
            raise
        except Exception as error:
            if type(error) in (AssertionError, AttributeError):  # OmegaConf raises them within a group that is null
                self._refuse_null_groups(overrides)
            raise one_line(error) from error
        with open_dict(config):
            del config["hydra"]
        return config

    def options(self) -> dict[str, list[str]]:
        """Recipes of each group, which ``group=option`` chooses among."""
        loader = self.hydra.config_loader
        groups = sorted(set(loader.list_groups("")) - {"hydra", "pipeline"})
        return {group: sorted(loader.get_group_options(group)) for group in groups}

    def _composed(self, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        return self.hydra.compose_config(CONFIG_NAME, list(overrides), mode)

    def _refuse_null_groups(self, overrides: Sequence[str]) -> None:
        """Refuse the first word that sets what is in a group that the chosen recipes leave null."""
        words = OverridesParser.create().parse_overrides(list(overrides))
        pairs = zip(overrides, words, strict=True)
        chosen = self._composed([said for said, word in pairs if "." not in word.key_or_group])
        for word in words:
            steps = word.key_or_group.split(".")
            for group in (".".join(steps[: i + 1]) for i in range(len(steps))):
                if group in described(recipe_type()) and OmegaConf.select(chosen, group) is None:
                    why = f"{group} is null; choose a recipe that has it, or write one (--config-dir)"
                    raise UserError(f"{word.input_line}: {why}")

    def _refuse_hydra_files(self, found: DictConfig, own: DictConfig) -> None:
        """Refuse settings of Hydra itself in recipe files."""
        says, says_itself = _plain(found), _plain(own)
        for key in says.keys() - _HYDRAS_NOTES:
            if says[key] != says_itself.get(key):
                raise UserError(f"hydra.{key}: {_NO_HYDRA}; take it out of the recipes of --config-dir")


_HYDRAS_NOTES = {"overrides", "runtime", "job", "mode"}
"""Keys in which Hydra records what it did."""
_NO_HYDRA = "Hydra composes recipes here and does nothing else, so it has no settings"


def refuse_hydra_words(overrides: Sequence[str]) -> None:
    """Refuse words that are for Hydra itself: its callbacks, launchers, search paths and the like.

    Raises:
        UserError: it names the word; or a word is no override.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        places = (override.key_or_group, override.package or "")
        if any(re.match(r"_?hydra_?\b", place) for place in places):
            raise UserError(f"{override.input_line}: {_NO_HYDRA}; leave it out")


@contextmanager
def opened_tree(config_dir: str | Path | None = None) -> Iterator[Tree]:
    """Context with the recipe tree opened for composing, and a folder of one's own beside it as in :func:`load_recipe`.

    Raises:
        UserError: the folder is not there.
    """
    main = recipes_dir()
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: no such folder; give one laid out like {main}")
    schema = OmegaConf.structured(recipe_type())
    OmegaConf.set_struct(schema.init_parts, False)  # its keys are patterns, the user's own
    ConfigStore.instance().store(name="recipe_schema", node=schema)
    with initialize_config_dir(config_dir=str(main), version_base="1.3"):
        if config_dir is not None:
            path = GlobalHydra.instance().config_loader().get_search_path()
            own = f"file://{Path(config_dir).absolute()}"
            path.prepend("--config-dir", own, anchor=SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("omni-train train", path)
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None  # made above
        yield Tree(hydra, pure=config_dir is None)


def read_recipe(path: str | Path) -> Recipe:
    """Recipe that ``write_recipe`` wrote, checked against the schema again.

    Its interpolations were resolved when it was written; none is resolved here.

    Raises:
        UserError: the file is missing, is not YAML, does not fit the schema, or refers to other values.
    """
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        why = getattr(error, "strerror", None) or "not YAML"
        raise UserError(f"{path}: {why}; expected the recipe.yaml of a run") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: not a mapping of keys; expected the recipe.yaml of a run")
    try:
        written = _plain(config)
        _refuse_references(written)
        return to_recipe(OmegaConf.create(recipe_of_today(written)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _refuse_references(value: object, key: str = "") -> None:
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_references(name)
            _refuse_references(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{key or 'a key'}={value}: a run's recipe holds values alone; write out what is meant")


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe as YAML, atomically: every key but those that other networks have added.

    So it can be read where those are not installed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    foreign = [group for group in unused_groups(recipe.network) if group not in described(Recipe)]
    partial.write_text(OmegaConf.to_yaml(_without(OmegaConf.structured(recipe), foreign)))
    os.replace(partial, path)
