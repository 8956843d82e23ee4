"""Submission of a run to SLURM: commands that cannot work are refused before they are queued."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from omni_train.errors import UserError
from omni_train.slurm.command import of_task, run_directory


def submit(script: str, *arguments: str) -> NoReturn:
    """Validate a command and replace this process by ``sbatch OPTIONS script COMMAND``.

    Args:
        script: path of the batch script, whose ``#SBATCH`` lines are default options.
        arguments: options of sbatch, ``--``, and the command.

    Raises:
        UserError: there is no command, no SLURM, or the command cannot work on that many ranks.
    """
    if "--" not in arguments:
        raise UserError("-- must come before the command: launchers/slurm.sh [options of sbatch] -- train key=value …")
    options, command = arguments[: arguments.index("--")], list(arguments[arguments.index("--") + 1 :])
    header = [line.split()[1] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH ")]
    asked = _asked([*header, *options])
    run_directory(of_task(command, "0") if asked.array else command, _ranks(asked))
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: must be on PATH; submit from a login node, or use omni-train launch on one machine")
    for name in [name for name in os.environ if name.startswith(("SLURM_ARRAY_", "SLURM_RESTART_"))]:
        del os.environ[name]  # of the job that submits this one
    os.environ["OMNI_TRAIN_PYTHON"] = sys.executable
    os.execvp("sbatch", ["sbatch", *options, script, *command])


def _asked(options: Sequence[str]) -> argparse.Namespace:
    """Options of sbatch that determine the number of ranks, and whether it is a job array."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.error = _refuse
    for names in (("-N", "--nodes"), ("-n", "--ntasks"), ("--ntasks-per-node",), ("-a", "--array")):
        parser.add_argument(*names)
    return parser.parse_known_args(options)[0]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"options of sbatch: {message}")


def _ranks(asked: argparse.Namespace) -> int | None:
    try:
        return int(asked.ntasks) if asked.ntasks else int(asked.nodes) * int(asked.ntasks_per_node)
    except ValueError:  # a range: SLURM chooses
        return None
