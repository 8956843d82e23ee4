"""The command line over the recipe tree: overrides, ``--help``, ``--cfg``, ``--multirun``, in Hydra's syntax."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from omni_train.errors import UserError
from omni_train.processes import Exit
from omni_train.recipe import sweep
from omni_train.recipe.compose import Tree, opened_tree, to_recipe, used
from omni_train.recipe.help import overview, page
from omni_train.recipe.schema import Recipe
from omni_train.recipe.validate import validate

# Flags of Hydra's that would do something else than compose, and what to do without them.
_REFUSED = {
    "config_name": "the recipe is composed by config.yaml; choose with stage=, model=, data= and so on",
    "config_path": "the tree of recipes is omni_train's; add your own with --config-dir",
    "info": "--cfg job shows what is composed",
    "experimental_rerun": "it would run what a pickle says; start the run's command again",
    "shell_completion": "it knows commands of one word",
}
_ALONE = ("run", "multirun", "cfg")


def run(program: str, arguments: Sequence[str], job: Callable[[Recipe], int]) -> int:
    """Run the command line of recipes: show a recipe, or compose and validate recipes and pass each to ``job``.

    Under ``--multirun`` the jobs run in ``runs_dir/run/0``, ``/1`` and so on, one after the other or as a launcher
    plugin of Hydra's has it (:mod:`omni_train.recipe.sweep`). What cannot work is refused before the first; one that
    fails is reported and the next ones run all the same, but with several processes, which may not agree on how it
    failed. One that was asked to stop is the last.

    Args:
        program: name of the program in the help.
        arguments: arguments of the command line, in Hydra's syntax.
        job: function that runs a validated recipe and returns an exit code.

    Returns:
        The exit code of the job; of several that of the one that was stopped, else the worst.

    Raises:
        UserError: a recipe cannot be composed or cannot work.
    """
    options = parse(arguments)
    launcher, words = sweep.split(options.overrides)
    shows = options.help or options.hydra_help
    if launcher.words and (shows or not options.multirun):
        raise UserError(f"{launcher.words[0]}: goes with --multirun")
    with opened_tree(options.config_dir) as tree:
        if options.help:
            print(_help(tree, words))
            return Exit.finished
        if options.hydra_help or not options.multirun:
            composed = tree.compose(words)
            recipes = [to_recipe(composed)]
            if options.hydra_help:  # Hydra's own help resets logging, and closes the handlers of others
                print(tree.hydra.format_args_help(get_args_parser()))
                return Exit.finished
            if options.cfg:
                validate(recipes[0], world_size=None)
                print(_yaml(composed, options.package, options.resolve), end="")
                return Exit.finished
        else:
            jobs = sweep.jobs(words)
            recipes = [to_recipe(tree.compose(words, RunMode.MULTIRUN)) for words in jobs]
            folder = str(Path(recipes[0].runs_dir, recipes[0].run))
            for number, recipe in enumerate(recipes):
                recipe.run = f"{recipe.run}/{number}"
    for recipe in recipes:
        validate(recipe, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if not options.multirun:
        return job(recipes[0])
    if launcher.name == sweep.BASIC:
        return sweep.one_after_the_other(recipes, job)
    own = ["--config-dir", options.config_dir] if options.config_dir else []
    commands = {
        recipe.run: [*(word for word in words if not word.startswith("run=")), f"run={sweep.quoted(recipe.run)}", *own]
        for words, recipe in zip(jobs, recipes, strict=True)
    }
    return sweep.Sweep(launcher, folder, commands).run()


def parse(arguments: Sequence[str]) -> Namespace:
    """Flags of a command line, and its other words as `overrides`.

    Raises:
        UserError: a flag does not exist, is not supported, or does not go with another.
    """
    parser = get_args_parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]  # argparse has no other place to say how it fails
    options = parser.parse_intermixed_args(list(arguments))
    for name, why in _REFUSED.items():
        if getattr(options, name):
            _refuse_flag(f"--{name.replace('_', '-')} is not for omni-train: {why}")
    if len(given := [f"--{name}" for name in _ALONE if getattr(options, name)]) > 1:
        _refuse_flag(f"{' and '.join(given)}: give one of them")
    if options.cfg in ("hydra", "all"):
        _refuse_flag(f"--cfg {options.cfg}: there is nothing of Hydra's to show; write --cfg job")
    if options.resolve and not options.cfg:
        _refuse_flag("--resolve goes with --cfg")
    if options.package and not options.cfg:
        _refuse_flag("--package goes with --cfg")
    return options


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; omni-train train --hydra-help lists the flags, everything else is key=value")


def _help(tree: Tree, words: Sequence[str]) -> str:
    """Help pages of the keys that words name, else the first page; overrides among the words are checked."""
    names = [word for word in words if "=" not in word]
    if overrides := [word for word in words if "=" in word]:
        to_recipe(tree.compose(overrides))
    return "\n\n".join(map(page, names)) if names else overview(tree.options())


def _yaml(composed: DictConfig, package: str | None, resolve: bool) -> str:
    """YAML of a composed recipe, or of a part of it."""
    part = used(composed)
    if package:
        part = OmegaConf.select(part, package)
    if part is None:
        _refuse_flag(f"--package {package}: no such part of the recipe")
    return OmegaConf.to_yaml(part, resolve=resolve) if OmegaConf.is_config(part) else f"{part}\n"
