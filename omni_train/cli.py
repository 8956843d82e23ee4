"""``omni-train {train, pipeline, data, convert}``: parse and dispatch, nothing else.

What a command needs is imported when it runs, so that help and mistakes answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omni_train.errors import UserError, announce
from omni_train.threads import keep_awake

_USAGE = """\
omni-train <command> [arguments]

  train      train what a recipe says; run again, it resumes
               omni-train train --help
  pipeline   train several stages, each from the one before
               omni-train pipeline name=smoke
  data       write a data set: our own small one, the samples of a manifest, or a codec's codes beside speech
               omni-train data rehearsal out=DIR
               omni-train data pack manifest=FILE.jsonl out=DIR tokenizer=DIR
               omni-train data codes data=DIR codec=CHECKPOINT
  convert    Hugging Face folders in and out
               omni-train convert import format=qwen3_5_moe hf=DIR checkpoint=DIR

Exit codes: 0 done; 1 a crash; 2 something given is wrong (one line says what); 75 asked to stop, all is saved and the
same command goes on; 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a ``UserError`` becomes one line on stderr and its status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "pipeline": _pipeline, "data": _data, "convert": _convert}
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_USAGE)
            return 0 if arguments else 2
        if arguments[0] not in commands:
            raise UserError(f"{arguments[0]} is not a command; choose one of {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except UserError as error:
        announce(error)
        return error.status
    except KeyboardInterrupt:
        return 130


def _train(arguments: list[str]) -> int:
    from omni_train.recipe import hydra_app
    from omni_train.recipe.schema import Recipe

    keep_awake()

    def job(recipe: Recipe) -> int:
        from omni_train.training.run import run

        return run(recipe)

    return hydra_app.run("omni-train train", arguments, job)


def _pipeline(arguments: list[str]) -> int:
    from omni_train.recipe import pipeline

    keep_awake()

    def job(stages: pipeline.Pipeline) -> int:
        from omni_train.training.pipeline import run_pipeline

        return run_pipeline(stages)

    return pipeline.run(arguments, job)


def _data(arguments: list[str]) -> int:
    from omni_train.options import call

    def rehearsal():
        from data_pipelines.rehearsal import build

        return build

    def pack():
        from data_pipelines.pack import pack

        return pack

    def codes():
        from omni_train.training.codec_checkpoint import write_codes

        return write_codes

    return call("omni-train data", {"rehearsal": rehearsal, "pack": pack, "codes": codes}, arguments)


def _convert(arguments: list[str]) -> int:
    from omni_train.options import call

    def import_():
        from omni_train.interop.convert import import_checkpoint

        return import_checkpoint

    def export():
        from omni_train.interop.convert import export_checkpoint

        return export_checkpoint

    return call("omni-train convert", {"import": import_, "export": export}, arguments)
