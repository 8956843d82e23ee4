"""A pipeline: stages that run one after the other, each from the checkpoint of the one before.

``recipes/pipeline/NAME.yaml`` lists them in words of the command line::

    all: [model=tiny, precision=fp32]  # of every stage
    stages:
      text_pretrain: []
      s2_general: [data=rehearsal_omni, init_from=text_pretrain]

A stage takes the recipe ``stage=`` of its own name, unless its words choose another. A key that names a checkpoint
(`init_from`, the values of `init_parts`, …) may name an earlier stage; a stage without an `init_from` starts from the
one before that trains the same network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe, recipes_dir, used
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.hydra_app import parse
from omni_train.recipe.keys import key_of
from omni_train.recipe.schema import Recipe
from omni_train.recipe.validate import validate

_USAGE = """\
omni-train pipeline name=NAME [run=RUN] [key=value …] [STAGE.key=value …] [--cfg job] [--config-dir DIR]

Runs the stages of a pipeline one after the other, in runs/RUN/STAGE, each from the checkpoint of the one before that
trains the same network. NAME is one of those below or a file of your own, and RUN is NAME until it is given. The same
command again skips the stages that are complete and goes on with the first that is not. A word of `omni-train train` is
for every stage, with STAGE. before it for that stage alone; --cfg job shows the composed stages and runs nothing, and
--config-dir adds recipes of your own, pipelines among them.

  omni-train launch 2 pipeline name=smoke run=mine schedule.steps=5 s2_general.schedule.steps=50

Pipelines and their stages:
"""


@dataclass
class Pipeline:
    """Composed and validated stages in their order; each starts from a path, or from the run directory of another."""

    directory: Path  # of the whole, with the stages' run directories in it
    stages: dict[str, Recipe]

    def to_yaml(self) -> str:
        """YAML of the keys that each stage uses of its recipe."""
        return OmegaConf.to_yaml({name: used(OmegaConf.structured(recipe)) for name, recipe in self.stages.items()})


def run(arguments: Sequence[str], job: Callable[[Pipeline], int]) -> int:
    """Run the command line of pipelines: show help or the composed stages, or pass the pipeline to ``job``.

    Returns:
        The exit code of the job, 0 where something was shown.

    Raises:
        UserError: as :func:`load_pipeline`, or a flag that is none.
    """
    options = parse(arguments)
    for name, given in vars(options).items():
        if given and name not in ("overrides", "help", "cfg", "config_dir"):
            raise UserError(f"--{name.replace('_', '-')}: a pipeline takes --help, --cfg job and --config-dir alone")
    if options.cfg not in (None, "job"):
        raise UserError(f"--cfg {options.cfg}: of a pipeline there is --cfg job")
    if options.help:
        print(_usage(options.config_dir))
    elif options.cfg:
        print(load_pipeline(options.overrides, None, options.config_dir).to_yaml(), end="")
    else:
        return job(load_pipeline(options.overrides, int(os.environ.get("WORLD_SIZE", "1")), options.config_dir))
    return 0


def _usage(config_dir: str | None) -> str:
    known = _known(config_dir).values()
    return _USAGE + "\n".join(f"  {path.stem}: {' → '.join(_read(path)[1])}" for path in known)


def _known(config_dir: str | None) -> dict[str, Path]:
    """File of each pipeline by name, ours before those of ``config_dir``, as Hydra takes them."""
    folders = [Path(config_dir)] if config_dir else []
    found = [path for folder in (*folders, recipes_dir()) for path in sorted((folder / "pipeline").glob("*.yaml"))]
    return {path.stem: path for path in found}


def load_pipeline(words: Sequence[str], world_size: int | None, config_dir: str | None = None) -> Pipeline:
    """Compose and validate all stages of a pipeline.

    Args:
        words: ``name=…``, ``run=…`` and overrides of all stages or of one, as typed.
        world_size: processes that will run it; None as in :func:`omni_train.recipe.validate.validate`.
        config_dir: as of :func:`omni_train.recipe.compose.load_recipe`, with pipelines in its ``pipeline``.

    Raises:
        UserError: no such pipeline, a file that is none, or a stage that cannot be composed or cannot work.
    """
    own = dict(word.split("=", 1) for word in words if word.startswith(("name=", "run=")))
    path = _find(own.get("name", ""), _known(config_dir))
    shared, listed = _read(path)
    for_all, for_one = _sort(words, listed)
    run = own.get("run") or path.stem
    stages: dict[str, Recipe] = {}
    for stage, its_own in listed.items():
        overrides = [f"stage={stage}", *shared, *its_own, *for_all, *for_one[stage], f"run={run}/{stage}"]
        last = {word.partition("=")[0]: word for word in overrides}  # Hydra takes a group only once
        try:
            recipe = _started(load_recipe([*last.values()], config_dir), stages)
            validate(recipe, world_size)
        except UserError as error:
            raise UserError(f"{stage}: {error}") from error
        stages[stage] = recipe
    return Pipeline(Path(next(iter(stages.values())).runs_dir, run), stages)


def _find(name: str, known: dict[str, Path]) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in known:
        problem = f"name={name}: no such pipeline" if name else "name= is missing"
        raise UserError(f"{problem}; choose one of {', '.join(known)}, or a file of your own that ends in .yaml")
    return known[name]


def _read(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Words of all stages in a pipeline's file, and those of each stage."""
    try:
        file = yaml.safe_load(path.read_text())
        shared, stages = file.pop("all", []), file.pop("stages")
        if (
            file
            or not stages
            or not all(isinstance(word, str) for words in (shared, *stages.values()) for word in words)
        ):
            raise TypeError
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a pipeline") from error
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise UserError(
            f"{path}: not a pipeline; write `stages:`, each a name with a list of key=value words"
        ) from None
    keys = {entry.name for entry in fields(recipe_type())}
    if taken := next((name for name in stages if name in keys or "." in name), None):
        raise UserError(f"{path}: a stage cannot be called {taken}: that is a key of the recipe, or has a dot")
    return shared, stages


def _sort(words: Sequence[str], stages: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Typed words for all stages, and those for each stage."""
    for_all: list[str] = []
    for_one: dict[str, list[str]] = {stage: [] for stage in stages}
    keys = {entry.name for entry in fields(recipe_type())}
    for word in words:
        stage, _, rest = word.partition(".")
        key = word.partition("=")[0]
        if stage in for_one:
            for_one[stage].append(rest)
        elif key in ("init_from", "stage"):
            raise UserError(f"{word}: is for one stage; write STAGE.{word}, STAGE one of {', '.join(for_one)}")
        elif "." in key and key.partition(".")[0] not in keys:
            raise UserError(f"{word}: {stage} is neither a stage nor a key of the recipe; stages: {', '.join(for_one)}")
        elif key not in ("name", "run"):
            for_all.append(word)
    return for_all, for_one


def _started(recipe: Recipe, before: dict[str, Recipe]) -> Recipe:
    """Recipe of a stage with run directories in the place of stages' names; `init_from` is by default that before."""

    def directory(source: str) -> str:
        return str(Path(before[source].runs_dir, before[source].run)) if source in before else source

    alike = [name for name, stage in before.items() if stage.network == recipe.network]
    recipe.init_from = recipe.init_from or next(reversed(alike), None)
    return with_sources(recipe, directory)


def with_sources(recipe: Recipe, change: Callable[[str], str]) -> Recipe:
    """Recipe with every checkpoint that it names replaced by ``change`` of it."""

    def within(value: Any, names: bool) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            keys = {one.name: key_of(one).checkpoint for one in fields(value)}
            return replace(value, **{name: within(getattr(value, name), names) for name, names in keys.items()})
        if isinstance(value, dict):
            return {name: within(one, names) for name, one in value.items()}
        if isinstance(value, list):
            return [within(one, names) for one in value]
        return change(value) if names and value else value

    return within(recipe, False)
