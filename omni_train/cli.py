"""``omni-train {train, pipeline, generate, data, convert, launch}``: parse and dispatch, nothing else.

What a command needs is imported when it runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import TracebackType

from omni_train import __version__, commands, lines, machine, stopping
from omni_train.errors import RankFailed, UserError, announce, described
from omni_train.processes import Exit, die_with_parent
from omni_train.threads import keep_awake

_USAGE = """\
omni-train <command> [arguments]

  train      train what a recipe says; run again, it resumes
               omni-train train --help
  pipeline   train several stages, each from the one before
               omni-train pipeline name=smoke
  generate   write an answer, and speak it while it is written
               omni-train generate checkpoint=RUN prompt="…" speech=out.wav
  data       write a data set: our own small one, the samples of a manifest; a codec's codes or scores beside speech, or
             a Thinker's states beside chats
               omni-train data rehearsal out=DIR
               omni-train data pack manifest=FILE.jsonl out=DIR tokenizer=DIR
               omni-train data codes data=DIR codec=CHECKPOINT
               omni-train data strata data=DIR
               omni-train data states out=DIR stage=… talker_training.thinker=CHECKPOINT
  convert    Hugging Face folders in and out
               omni-train convert import format=qwen3_5_moe hf=DIR checkpoint=DIR
  launch     run one of these commands on N processes of this machine, with the settings that suit it
               omni-train launch 2 pipeline name=smoke
  --version  of omni_train

SIGTERM, SIGUSR1 and Ctrl-C stop train and pipeline where all is saved; a second Ctrl-C ends them at once.

Exit codes: 0 done; 1 a crash; 2 something given is wrong; 75 asked to stop, all is saved and the same command goes on;
130 ended at once by a second Ctrl-C, or another command by its first. The last line says why a run ended."""


_SHOWS = {"-h", "--help", "--hydra-help", "--cfg", "-c", "--version"}
"""Flags with which a command writes a page and does nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a ``UserError`` becomes one line on stderr and its status.

    Args:
        argv: None for the process's own, which then also gets the signals and the last line of a run.
    """
    if argv is None:
        return _as_process(sys.argv[1:])
    arguments = list(argv)
    known = {
        "train": _train,
        "pipeline": _pipeline,
        "generate": _generate,
        "data": _data,
        "convert": _convert,
        "launch": _launch,
    }
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_USAGE)
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(f"omni_train {__version__}")
            return 0
        if arguments[0] not in known:
            raise UserError(f"{arguments[0]} is not a command; choose one of {', '.join(known)}")
        return known[arguments[0]](arguments[1:])
    except UserError as error:
        announce(error)
        return error.status
    except RankFailed as error:
        if os.environ.get("RANK") == "0":
            lines.write(f"failed: {error}")
        return error.code
    except KeyboardInterrupt:
        return Exit.interrupted


def _as_process(arguments: list[str]) -> int:
    launcher = os.environ.pop("OMNI_TRAIN_LAUNCHER", None)  # which programs started from here do not have
    if launcher or os.environ.get("TORCHELASTIC_RUN_ID"):
        die_with_parent(int(launcher) if launcher else None)  # rather than train on beside a new run
    if arguments and arguments[0] in stopping.COMMANDS:
        stopping.listen()
        sys.excepthook = _say_what_failed
    elif arguments[:1] == ["launch"]:
        stopping.hold()  # they are for the ranks
    else:
        stopping.let_go()
    try:
        code = main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _SHOWS & set(arguments):
            raise
        code = int(Exit.finished)  # whoever reads, as `head` does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    stopping.over()
    lines.flush()
    return code


def _say_what_failed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    lines.write(f"failed: {described(error)}")
    stopping.over()
    lines.flush()


def _launch(arguments: list[str]) -> int:
    from omni_train import launch

    if arguments[:1] in (["-h"], ["--help"]):
        print(launch.USAGE)
        return Exit.finished
    return launch.main(arguments, ("train", "pipeline", "data", "convert"))


def _train(arguments: list[str]) -> int:
    from omni_train.recipe import hydra_app
    from omni_train.recipe.schema import Recipe

    keep_awake()
    machine.say_what_came_too_late()

    def job(recipe: Recipe) -> int:
        from omni_train.training.run import run

        return run(recipe)

    return hydra_app.run("omni-train train", arguments, job)


def _pipeline(arguments: list[str]) -> int:
    from omni_train.recipe import pipeline

    keep_awake()
    machine.say_what_came_too_late()

    def job(stages: pipeline.Pipeline) -> int:
        from omni_train.training.pipeline import run_pipeline

        return run_pipeline(stages)

    return pipeline.run(arguments, job, commands.DATA)


def _generate(arguments: list[str]) -> int:
    from omni_train.options import call

    def generate():
        from omni_train.generation.command import generate

        return generate

    return call("omni-train", {"generate": generate}, ["generate", *arguments])


def _data(arguments: list[str]) -> int:
    from omni_train.options import call

    return call("omni-train data", commands.DATA, arguments)


def _convert(arguments: list[str]) -> int:
    from omni_train.options import call

    def import_():
        from omni_train.interop.convert import import_checkpoint

        return import_checkpoint

    def export():
        from omni_train.interop.convert import export_checkpoint

        return export_checkpoint

    return call("omni-train convert", {"import": import_, "export": export}, arguments)
