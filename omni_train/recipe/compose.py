"""From the Hydra tree, or from a run's own ``recipe.yaml``, to a typed ``Recipe`` and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from omni_train.errors import UserError
from omni_train.recipe.messages import one_line
from omni_train.recipe.schema import Recipe

CONFIG_NAME = "config"
PACKAGE = Path(__file__).resolve().parent.parent

_SCHEMA = OmegaConf.structured(Recipe)
OmegaConf.set_struct(_SCHEMA.init_parts, False)  # its keys are patterns, the user's own
ConfigStore.instance().store(name="recipe_schema", node=_SCHEMA)


def recipes_dir() -> Path:
    """The Hydra tree: ``omni_train/recipes`` of an installed wheel, else ``recipes`` of the source checkout.

    Raises:
        UserError: neither is there.
    """
    candidates = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
    for candidate in candidates:
        if (candidate / f"{CONFIG_NAME}.yaml").is_file():
            return candidate
    raise UserError(f"no recipes in {' or '.join(map(str, candidates))}; install omni_train again")


def to_recipe(config: DictConfig) -> Recipe:
    """A composed configuration as real dataclasses and enums, interpolations resolved.

    Raises:
        UserError: a key is not in the schema, a mandatory key has no value, or an interpolation cannot be resolved.
    """
    try:
        # Merged onto the bare schema once more, because Hydra's `+key=value` adds keys past the schema's strictness.
        strict = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.to_container(config))
        return OmegaConf.to_object(strict)
    except Exception as error:
        raise one_line(error) from error


def load_recipe(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Recipe:
    """Compose a recipe from the tree.

    Args:
        overrides: in Hydra's syntax, e.g. ``["stage=s2_general", "parallel.tensor=2"]``.
        config_dir: another tree than ``recipes_dir()``.

    Raises:
        UserError: one line that names the key or option and what would be right.
    """
    directory = Path(config_dir or recipes_dir()).resolve()
    try:
        with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
            return to_recipe(compose(CONFIG_NAME, overrides=list(overrides)))
    except UserError:
        raise
    except Exception as error:
        raise one_line(error) from error


def read_recipe(path: str | Path) -> Recipe:
    """A recipe that ``write_recipe`` wrote, checked against the schema again.

    Raises:
        UserError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        config = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        why = getattr(error, "strerror", None) or "not YAML"
        raise UserError(f"{path}: {why}; expected the recipe.yaml of a run") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: not a mapping of keys; expected the recipe.yaml of a run")
    try:
        return to_recipe(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write every key of the recipe as YAML, at once or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))
    os.replace(partial, path)
