"""Hydra's command line over the recipe tree: overrides, ``--help``, ``--cfg``, ``--multirun``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from omni_train.errors import UserError
from omni_train.recipe.compose import CONFIG_NAME, load_recipe, recipes_dir, to_recipe
from omni_train.recipe.messages import one_line
from omni_train.recipe.schema import Recipe
from omni_train.recipe.validate import validate


def run(program: str, arguments: Sequence[str], job: Callable[[Recipe], int]) -> int:
    """Do what the arguments say: show a recipe, or compose, validate and hand each one to ``job``.

    Under ``--multirun`` the jobs run one after the other in ``runs_dir/run/0``, ``/1`` and so on, until one fails.

    Args:
        program: the name that help shows.
        arguments: of the command line, in Hydra's syntax.
        job: runs a validated recipe and returns an exit code.

    Returns:
        The exit code of the last job, 0 where there was nothing to run.

    Raises:
        UserError: the recipe cannot be composed or cannot work.
        SystemExit: after printing help, with code 0.
    """
    outcome: list[int | BaseException] = []

    def task(config: DictConfig) -> None:
        if outcome and outcome[-1] != 0:
            return
        # Kept and raised after Hydra is done, which would otherwise print a report of its own.
        try:
            recipe = to_recipe(config)
            hydra_config = HydraConfig.get()
            if hydra_config.mode is RunMode.MULTIRUN:
                recipe.run = f"{recipe.run}/{hydra_config.job.num}"
            validate(recipe, world_size=int(os.environ.get("WORLD_SIZE", "1")))
            outcome.append(job(recipe))
        except Exception as error:
            outcome.append(error)

    parser = get_args_parser()
    parser.error = _refuse_flag
    options = parser.parse_args(list(arguments))
    try:
        with _as_script(program, arguments):
            if options.cfg:
                validate(load_recipe(options.overrides), world_size=None)
            hydra.main(config_path=str(recipes_dir()), config_name=CONFIG_NAME, version_base="1.3")(task)()
    except Exception as error:
        raise one_line(error) from error
    if outcome and isinstance(outcome[-1], BaseException):
        raise outcome[-1]
    return outcome[-1] if outcome else 0


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{message}; omni-train train --hydra-help lists the flags, everything else is key=value")


@contextmanager
def _as_script(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """What Hydra needs around it: it reads ``sys.argv``, and raises its errors only when asked for full ones."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [program, *arguments], "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
