"""A pipeline: stages that run one after the other, each from the checkpoint of the one before.

``recipes/pipeline/NAME.yaml`` lists them in words of the command line::

    all: [model=tiny, precision=fp32]  # of every stage
    stages:
      text_pretrain: []
      s2_general: [data=rehearsal_omni, init_from=text_pretrain]

A stage takes the recipe ``stage=`` of its own name, unless its words choose another. A key that names a checkpoint
(`init_from`, the values of `init_parts`, …) may name an earlier stage; a stage without an `init_from` starts from the
one before that trains the same network.

A stage may make data instead: its first word is ``command=data NAME``, the others are arguments of that command of
``omni-train data``. An argument that begins with the name of an earlier stage means its directory, and so does a key of
a recipe that names data (`data.path`, those of `data.sources`, …) where that stage made data::

    codec: [data=rehearsal_crops]
    codes: [command=data codes, data=rehearsal/speech, codec=codec]
    code2wav: [data=rehearsal_crops, data.path=rehearsal, "data.sources=[{path: codes}]", data.codec=codec]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from omni_train.errors import UserError, about
from omni_train.recipe.compose import load_recipe, recipes_dir, used
from omni_train.recipe.data_stage import NO_COMMANDS, Commands, DataStage, data_stage, makes_data
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.hydra_app import parse
from omni_train.recipe.keys import Key, key_of
from omni_train.recipe.schema import Recipe
from omni_train.recipe.validate import validate

_USAGE = """\
omni-train pipeline name=NAME [run=RUN] [key=value …] [STAGE.key=value …] [--cfg job] [--config-dir DIR]

Runs the stages of a pipeline one after the other, in runs/RUN/STAGE, each from the checkpoint of the one before that
trains the same network. NAME is one of those below or a file of your own, and RUN is NAME until it is given. The same
command again skips the stages that are complete and goes on with the first that is not. A word of `omni-train train` is
for every stage that trains, with STAGE. before it for that stage alone, which may be one that makes data and takes the
words of its `omni-train data` command; --cfg job shows the composed stages and runs nothing, and --config-dir adds
recipes of your own, pipelines among them.

  omni-train launch 2 pipeline name=smoke run=mine schedule.steps=5 s2_general.schedule.steps=50

Pipelines and their stages:
"""


@dataclass
class Pipeline:
    """Composed and validated stages in their order; each starts from a path, or from the run directory of another."""

    directory: Path  # of the whole, with the stages' directories in it
    stages: Mapping[str, Recipe | DataStage]

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Stages that train."""
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, Recipe)}

    def to_yaml(self) -> str:
        """YAML of the keys that each stage uses of its recipe, or of the command and its arguments."""
        shown = {
            name: {"command": stage.command, **stage.words}
            if isinstance(stage, DataStage)
            else used(OmegaConf.structured(stage))
            for name, stage in self.stages.items()
        }
        return OmegaConf.to_yaml(shown)


def run(arguments: Sequence[str], job: Callable[[Pipeline], int], commands: Commands = NO_COMMANDS) -> int:
    """Run the command line of pipelines: show help or the composed stages, or pass the pipeline to ``job``.

    Args:
        arguments: words behind ``omni-train pipeline``.
        job: runs a pipeline and returns its exit code.
        commands: what stages that make data may run.

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
        print(load_pipeline(options.overrides, None, options.config_dir, commands).to_yaml(), end="")
    else:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return job(load_pipeline(options.overrides, world_size, options.config_dir, commands))
    return 0


def _usage(config_dir: str | None) -> str:
    known = _known(config_dir).values()
    return _USAGE + "\n".join(f"  {path.stem}: {' → '.join(_read(path)[1])}" for path in known)


def _known(config_dir: str | None) -> dict[str, Path]:
    """File of each pipeline by name, ours before those of ``config_dir``, as Hydra takes them."""
    folders = [Path(config_dir)] if config_dir else []
    found = [path for folder in (*folders, recipes_dir()) for path in sorted((folder / "pipeline").glob("*.yaml"))]
    return {path.stem: path for path in found}


def load_pipeline(
    words: Sequence[str], world_size: int | None, config_dir: str | None = None, commands: Commands = NO_COMMANDS
) -> Pipeline:
    """Compose and validate all stages of a pipeline.

    Args:
        words: ``name=…``, ``run=…`` and overrides of all stages or of one, as typed.
        world_size: processes that will run it; None as in :func:`omni_train.recipe.validate.validate`.
        config_dir: as of :func:`omni_train.recipe.compose.load_recipe`, with pipelines in its ``pipeline``.
        commands: what stages that make data may run.

    Raises:
        UserError: no such pipeline, a file that is none, or a stage that cannot be composed or cannot work.
    """
    own = dict(word.split("=", 1) for word in words if word.startswith(("name=", "run=")))
    path = _find(own.get("name", ""), _known(config_dir))
    shared, listed = _read(path)
    for_all, for_one = _sort(words, listed)
    run = own.get("run") or path.stem
    recipes: dict[str, Recipe] = {}
    for stage, its_own in listed.items():
        if makes_data(its_own):
            continue
        overrides = [f"stage={stage}", *shared, *its_own, *for_all, *for_one[stage], f"run={run}/{stage}"]
        last = {word.partition("=")[0]: word for word in overrides}  # Hydra takes a group only once
        with about(stage):
            recipes[stage] = load_recipe([*last.values()], config_dir)
    if not recipes:
        raise UserError(f"{path}: no stage trains; `omni-train data` alone makes data")
    folder = Path(next(iter(recipes.values())).runs_dir, run)
    stages: dict[str, Recipe | DataStage] = {}
    for stage, its_own in listed.items():
        with about(stage):
            if stage in recipes:
                stages[stage] = recipe = _started(recipes[stage], stages)
                validate(recipe, world_size)
            else:
                made = data_stage([*its_own, *for_one[stage]], str(Path(f"{folder}/{stage}")), commands)
                stages[stage] = made.with_inputs(_within(stages))
    return Pipeline(folder, stages)


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


def _started(recipe: Recipe, before: Mapping[str, Recipe | DataStage]) -> Recipe:
    """Recipe of a stage with directories in the place of stages' names; `init_from` is by default that before."""
    trained = {name: stage for name, stage in before.items() if isinstance(stage, Recipe)}
    made = {name: stage for name, stage in before.items() if isinstance(stage, DataStage)}
    alike = [name for name, stage in trained.items() if stage.network == recipe.network]
    recipe.init_from = recipe.init_from or next(reversed(alike), None)
    return with_sources(
        recipe, lambda source: directory(trained[source]) if source in trained else source, _within(made)
    )


def directory(stage: Recipe | DataStage) -> str:
    """Directory that a stage writes."""
    return stage.out if isinstance(stage, DataStage) else str(Path(stage.runs_dir, stage.run))


def _within(stages: Mapping[str, Recipe | DataStage]) -> Callable[[str], str]:
    """Function that puts a stage's directory in the place of its name, where a path begins with it."""

    def place(path: str) -> str:
        name, slash, rest = path.partition("/")
        return directory(stages[name]) + slash + rest if name in stages else path

    return place


def with_sources(
    recipe: Recipe, checkpoint: Callable[[str], str], data: Callable[[str], str] = lambda path: path
) -> Recipe:
    """Recipe with other checkpoints and data.

    Args:
        recipe: stays as it is.
        checkpoint: what comes in the place of each checkpoint that the recipe names.
        data: what comes in the place of each folder of data.
    """

    def within(value: Any, said: Key) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{one.name: within(getattr(value, one.name), key_of(one)) for one in fields(value)})
        if isinstance(value, dict):
            return {name: within(one, said) for name, one in value.items()}
        if isinstance(value, list):
            return [within(one, said) for one in value]
        if said.checkpoint and value:
            return checkpoint(value)
        return data(value) if said.data and value else value

    return within(recipe, Key())
