"""Jobs of ``--multirun``: one after the other in this process, or wherever a launcher plugin of Hydra's runs them.

With ``hydra/launcher=NAME`` a job is an ``omni-train train`` of its own, started by the plugin: with its own signals
and exit code, and no harm to the others however it ends. A plugin and its settings come from the command line alone,
never from a file of ``--config-dir``.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from omni_train import lines, machine, stopping
from omni_train.errors import UserError, announce, first_line
from omni_train.processes import Exit, die_with_parent
from omni_train.recipe.compose import refuse_hydra_words
from omni_train.recipe.messages import one_line
from omni_train.recipe.schema import Recipe

BASIC = "basic"
"""Launcher where none is named: one job after the other, in this process."""

_CHOICE = re.compile(r"hydra/launcher=([\w-]+)")
_SETTING = re.compile(r"\+?hydra\.launcher(?:\.[A-Za-z]\w*)+=")
_NOT_PLAIN = re.compile(r"_target_|\$\{")  # of which Hydra would make objects
_PROGRAM = (sys.executable, "-m", "omni_train", "train")
# What a launcher of ours or torchrun set for this process, but not for its jobs.
_PLACE = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
_GLANCE = 0.1  # seconds between two looks at whether a signal came


@dataclass(frozen=True)
class Launcher:
    """Launcher of Hydra's: its name, and the words that were typed for it."""

    name: str = BASIC
    words: tuple[str, ...] = ()


def split(words: Sequence[str]) -> tuple[Launcher, list[str]]:
    """Launcher that the words name, and the words that are for the recipe.

    Raises:
        UserError: the launcher is named twice, or a word for it is no setting.
    """
    ours = [word for word in words if _CHOICE.fullmatch(word) or _SETTING.match(word)]
    names = [match[1] for word in ours if (match := _CHOICE.fullmatch(word))]
    if len(names) > 1:
        raise UserError(f"hydra/launcher={names[1]}: the launcher is {names[0]} already; keep one")
    if wrong := next(filter(_NOT_PLAIN.search, ours), None):
        raise UserError(f"{wrong}: a setting of a launcher is a plain value")
    if ours and names in ([], [BASIC]) and (setting := next(filter(_SETTING.match, ours), None)):
        raise UserError(f"{setting}: {BASIC} has no settings; choose a launcher with hydra/launcher=NAME")
    return Launcher(names[0] if names else BASIC, tuple(ours)), [word for word in words if word not in ours]


def jobs(words: Sequence[str]) -> list[list[str]]:
    """Words of each job of a sweep, the values of the last word changing fastest.

    Raises:
        UserError: a word is no override, or is for Hydra itself.
    """
    try:
        refuse_hydra_words(words)
        [split] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(words)), None)
    except UserError:
        raise
    except Exception as error:
        raise one_line(error) from error
    return split


def one_after_the_other(recipes: Sequence[Recipe], job: Callable[[Recipe], int]) -> int:
    """Run all jobs in this process; returns the exit code of one that was stopped, which ends all, else the worst."""
    codes = []
    for recipe in recipes:
        try:
            code = job(recipe)
        except UserError as error:
            announce(error)
            code = Exit.wrong
        except Exception:
            traceback.print_exc()
            code = Exit.failed
        codes.append(int(code))
        if code in _STOPPED or (code and int(os.environ.get("WORLD_SIZE", "1")) > 1):
            break
    return _worst(codes)


_STOPPED = (Exit.stopped, Exit.interrupted)


def _worst(codes: Sequence[int]) -> int:
    """Worst exit code: of a job that was stopped, else of a crash, which another try may mend, else of a mistake."""

    def badness(code: int) -> tuple[bool, bool, bool]:
        return code in _STOPPED, code not in (Exit.finished, Exit.wrong), code == Exit.wrong

    return max(codes, key=badness)


class Sweep:
    """Jobs that a launcher plugin starts.

    Args:
        launcher: the plugin, and its settings.
        folder: folder of the sweep, for files of the plugin.
        commands: words of ``omni-train train`` of each job, by the name of its run.

    Raises:
        UserError: the plugin is not installed, does not have a setting, or cannot work with several processes.
    """

    def __init__(self, launcher: Launcher, folder: str, commands: Mapping[str, Sequence[str]]) -> None:
        chosen = f"hydra/launcher={launcher.name}"
        if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise UserError(f"{chosen}: every job is a process of its own there, but these are {ranks}; leave it out")
        version.setbase("1.3")
        # Without --config-dir: a file of somebody else's chooses no program.
        hydra = Hydra("omni-train train", ConfigLoaderImpl(create_config_search_path(None)))
        if launcher.name not in (known := hydra.config_loader.get_group_options("hydra/launcher")):
            package = f"hydra-{launcher.name.partition('_')[0]}-launcher"
            raise UserError(f"{chosen}: not installed; pip install {package}, or choose one of {', '.join(known)}")
        silent = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null"]
        places = [f"hydra.sweep.dir={quoted(folder)}", "hydra.sweep.subdir=.", "hydra.job.chdir=false"]
        self._commands = commands
        try:
            config = hydra.compose_config(None, [*silent, *places, *launcher.words], RunMode.MULTIRUN)
            self._plugin = Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
                task_function=Task(tuple((*_PROGRAM, *words) for words in commands.values()), os.getcwd(), os.getpid()),
                config=config,
            )
        except Exception as error:
            raise UserError(f"{chosen}: {first_line(error)}") from error

    def run(self) -> int:
        """Run all jobs and return the worst exit code; each job that did not finish has its line."""
        lines.begin_log()
        with _signals_passed_on():
            ends = self._plugin.launch([[f"+job={number}"] for number in range(len(self._commands))], 0)
        codes = []
        for run, end in zip(self._commands, ends, strict=True):
            if end.status is JobStatus.COMPLETED:
                codes.append(end.return_value)
                how = f"ended with exit code {codes[-1]}"
            else:
                codes.append(int(Exit.failed))
                how = f"could not be started: {first_line(end._return_value)}"
            if codes[-1]:
                lines.write(f"{run}: {how} (omni-train train {shlex.join(self._commands[run])})")
        return _worst(codes)


def quoted(value: str) -> str:
    """Value quoted for a word of Hydra's, whatever is in it."""
    return value if re.fullmatch(r"[A-Za-z_][\w/.-]*", value) else "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"


@dataclass(frozen=True)
class Task:
    """Function that a launcher plugin pickles, sends to where a job runs, and calls there.

    Attributes:
        commands: command of each job.
        folder: folder that relative paths refer to.
        sweep: process id of the sweep.
    """

    commands: tuple[tuple[str, ...], ...]
    folder: str
    sweep: int

    def __call__(self, config: DictConfig) -> int:
        """Run the job that Hydra's configuration names, and return its exit code."""
        if os.getpid() != self.sweep:
            die_with_parent()
        stopping.hold()  # for the job's first line, and not for this process
        environment = {name: value for name, value in machine.environment(1).items() if not _PLACE.fullmatch(name)}
        environment |= {"PYTHONSAFEPATH": "1", "OMNI_TRAIN_LAUNCHER": str(os.getpid())}
        job = subprocess.Popen(self.commands[config.job], cwd=self.folder, env=environment, start_new_session=True)
        try:
            code = job.wait()
        finally:
            job.kill()
        return code if code >= 0 else 128 - code


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Context in which signals are passed on to the jobs on this machine, also to those that start later."""
    stopping.finish_first("the jobs finish their steps and save")
    stopping.hold()  # as inherited by a plugin's processes, which a terminal's Ctrl-C reaches too
    over = threading.Event()

    def watch() -> None:
        told = set()
        while not over.wait(_GLANCE):
            if (number := stopping.asked()) is None:
                continue
            for job in _running():
                if job.pid not in told:
                    told.add(job.pid)
                    job.send_signal(number)

    watching = threading.Thread(target=watch, name="sweep", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        stopping.let_go()


def _running() -> Iterator[psutil.Process]:
    """Processes of the jobs on this machine: they lead sessions of their own, and their parents are of ours."""
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == process.pid and os.getsid(process.ppid()) == os.getsid(0):
                yield process
