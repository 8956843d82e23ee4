"""Run the stages of a pipeline in one process per rank: skip what is complete, go on with what is not."""

from __future__ import annotations

import time
from pathlib import Path

from omni_train import lines, platform, stopping
from omni_train.checkpoint.sharded import read_progress
from omni_train.checkpoint.store import DamagedCheckpoint, newest, resolve, set_aside, step_of
from omni_train.data.rows.kinds import check_rows
from omni_train.errors import cannot_write
from omni_train.platform.logs import say, warn
from omni_train.processes import Exit
from omni_train.recipe.data_stage import DataStage
from omni_train.recipe.keys import Change
from omni_train.recipe.pipeline import Pipeline, directory, with_sources
from omni_train.recipe.schema import Recipe
from omni_train.tracking.report import report
from omni_train.training.data_stage import make_data
from omni_train.training.resume import changes, refuse_change
from omni_train.training.run import train
from omni_train.training.run_lock import RunLock, holding
from omni_train.training.schedule import Schedule
from omni_train.training.unlogged import UnloggedStep


def run_pipeline(pipeline: Pipeline) -> int:
    """Run every stage that is not complete, on this rank with whatever ranks the launcher started, then report.

    Returns:
        the process's exit status.

    Raises:
        UserError: a stage cannot work, or its directory holds a run of another recipe.
    """
    lines.begin_log()
    for recipe in pipeline.recipes.values():
        check_rows(recipe)
    # Commands that make data hold the folders that they write themselves.
    directories = (pipeline.directory, *(Path(directory(recipe)) for recipe in pipeline.recipes.values()))
    with holding(*directories, remedy="give another run=") as lock:
        return _run_stages(pipeline, lock)


def _run_stages(pipeline: Pipeline, lock: RunLock) -> int:
    if platform.rank() == 0:
        try:
            (pipeline.directory / "pipeline.yaml").write_text(pipeline.to_yaml())
        except OSError as error:
            raise cannot_write(pipeline.directory, error) from error
    names, number = list(pipeline.stages), 0
    while number < len(names):
        name = names[number]
        stage = _from_checkpoints(pipeline.stages[name], pipeline)
        title = f"stage {number + 1} of {len(names)}, {name}"
        try:
            if isinstance(stage, DataStage):
                make_data(stage, name, title, lock)
            elif is_complete(stage):
                say(f"{title}: complete, skipped")
            else:
                say(title)
                stopping.at_once(f"at the start of {title}, nothing new to save")
                if not train(stage, lock):
                    return Exit.stopped
        except DamagedCheckpoint as error:
            number = _go_back(error, pipeline, number)
            continue
        number += 1
    stopping.at_once("before the report, all stages are complete")
    if platform.rank() == 0 and any(recipe.schedule.steps for recipe in pipeline.recipes.values()):
        try:
            report(pipeline.directory)
        except OSError as error:
            warn(f"{pipeline.directory}: the report cannot be written: {error}")
    say(f"finished: all {len(pipeline.stages)} stages, runs and report in {pipeline.directory}")
    return Exit.finished


def _go_back(error: DamagedCheckpoint, pipeline: Pipeline, number: int) -> int:
    """Number of the earlier stage whose last checkpoint is damaged, and which must go on from the one before it.

    The damaged checkpoint is set aside.

    Args:
        error: what ended stage `number`, on all ranks.
        pipeline: the pipeline of the stages.
        number: number of the stage that could not start.

    Raises:
        DamagedCheckpoint: the damaged checkpoint is not of an earlier stage.
    """
    for before, (name, stage) in enumerate([*pipeline.stages.items()][:number]):
        folder = Path(directory(stage), "checkpoints").resolve()
        if error.checkpoint is not None and error.checkpoint.parent.resolve() == folder:
            say(f"stage {before + 1}, {name}: goes on from the checkpoint before")
            if platform.rank() == 0:
                set_aside(error.checkpoint)
            while error.checkpoint.exists():
                time.sleep(0.1)  # the other ranks are not synchronized here, and must not take it for the newest
            return before
    raise error


def is_complete(recipe: Recipe) -> bool:
    """Whether the run of this recipe has reached its end.

    Raises:
        UserError: the directory holds a run of another recipe.
    """
    directory = Path(recipe.runs_dir, recipe.run)
    checkpoint, stop = newest(directory / "checkpoints"), recipe.schedule.stop_after
    if checkpoint is None:
        return False
    if UnloggedStep(directory).exists():
        return False
    step = step_of(checkpoint)
    if stop is None or step < stop:
        try:
            tokens = read_progress(checkpoint)["tokens"]
        except DamagedCheckpoint:
            return False  # the run itself finds a checkpoint that it can resume from
        if not Schedule(recipe.schedule, recipe.optimizer).done(step, tokens):
            return False  # its own start refuses changes that are not allowed
    for change in changes(recipe, directory):
        if change.kind is not Change.free:
            refuse_change(directory, change)
    return True


def _from_checkpoints(stage: Recipe | DataStage, pipeline: Pipeline) -> Recipe | DataStage:
    """Stage that names the last checkpoints of earlier stages in the place of their directories.

    So the run can be repeated, and a stage notices that an earlier one was trained further.
    """
    runs = {directory(recipe) for recipe in pipeline.recipes.values()}

    def checkpoint(source: str) -> str:
        return str(Path(source, "checkpoints", resolve(source).name)) if source in runs else source

    return stage.with_inputs(checkpoint) if isinstance(stage, DataStage) else with_sources(stage, checkpoint)
