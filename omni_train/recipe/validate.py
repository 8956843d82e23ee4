"""Validation of a recipe: one pass that refuses what cannot work, before anything is allocated.

Each refusal is one line: the key and its value, what is wrong, what to do. docs/recipes.md has the table.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from math import lcm

from omni_train.errors import UserError
from omni_train.recipe.keys import values
from omni_train.recipe.networks import in_groups, network_of, unused_groups
from omni_train.recipe.refusals import divides, refuse, value
from omni_train.recipe.schema import (
    ChatTemplate,
    Decay,
    LossOn,
    Normalizer,
    OptimizerName,
    ParallelConfig,
    Recipe,
    WandbMode,
)
from omni_train.recipe.validate_engine import check_engine
from omni_train.recipe.validate_media import check_media


def validate(recipe: Recipe, world_size: int | None) -> None:
    """Refuse a recipe that cannot run.

    Args:
        recipe: a composed recipe.
        world_size: processes that will run it on this machine or cluster; None skips what depends on them and on the
            packages installed here, so that a recipe for a cluster can be checked anywhere.

    Raises:
        UserError: the first thing found, in one line.
    """
    _values(recipe)
    check_engine(recipe)
    network = network_of(recipe.network)
    for part in network.parts:
        if getattr(recipe.model, part) is None:
            refuse(recipe, "network", f"model={recipe.model.name} has no model.{part}; choose a model with it")
    if recipe.data.rows != network.rows:
        why = f"network={network.name} learns from data.rows={network.rows}; choose data that has them"
        refuse(recipe, "data.rows", why)
    network.validate(recipe)
    _rows(recipe)
    _strata(recipe)
    check_media(recipe)
    _optimization(recipe)
    if world_size is not None:
        _world(recipe, world_size)
        _packages(recipe)


def processes(parallel: ParallelConfig) -> int:
    """Smallest number of processes that the layout runs on."""
    return parallel.pipeline * lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)


def _values(recipe: Recipe) -> None:
    """Refuse values out of the schema's bounds, of all keys that the run uses."""
    unused = unused_groups(recipe.network)
    for name, said, found in values(recipe):
        if in_groups(name, unused):
            continue
        if problem := said.problem(found):
            raise UserError(f"{name}={found}: {problem}")


def _rows(recipe: Recipe) -> None:
    """Refuse lengths of rows, alignments and blends that cannot work."""
    data, parallel = recipe.data, recipe.parallel
    if parallel.context > 1:
        divides(recipe, 2 * parallel.context, "2·parallel.context", "data.alignment")
        pieces = 2 * parallel.context * parallel.tensor
        divides(recipe, pieces, "2·parallel.context·parallel.tensor", "data.row_tokens")
    divides(recipe, data.alignment, "data.alignment", "data.row_tokens")
    divides(recipe, parallel.tensor, "parallel.tensor", "data.row_tokens")
    if data.chat_template is ChatTemplate.qwen3_5 and data.loss_on is LossOn.all:
        refuse(
            recipe,
            "data.loss_on",
            "with data.chat_template=qwen3_5 a chat is learned once for each of its questions; set "
            "data.loss_on=assistant",
        )


def _strata(recipe: Recipe) -> None:
    """Refuse strata of which some can never be drawn from."""
    strata = recipe.data.strata
    names = [stratum.name for stratum in strata]
    for i, stratum in enumerate(strata):
        where = f"data.strata[{i}]"
        if not re.fullmatch(r"\w+", stratum.name, re.ASCII) or stratum.name in names[:i]:
            raise UserError(f"{where}.name={stratum.name}: must be letters, digits and _, and another for each stratum")
        given = {score: bounds for score, bounds in vars(stratum.when).items() if bounds}
        for score, bounds in given.items():
            least, greatest = bounds if len(bounds) == 2 else (1.0, 0.0)
            if least is not None and greatest is not None and not least <= greatest:
                raise UserError(f"{where}.when.{score}={bounds}: must be [least, greatest], null where there is none")
        if not given and i + 1 < len(strata):
            raise UserError(f"{where}: takes every sample, and {names[i + 1]} behind it gets none; put it last")
    if strata and not any(stratum.weight for stratum in strata):
        raise UserError("data.strata: all weights are 0, and nothing is left to read; raise one")


def _optimization(recipe: Recipe) -> None:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if optimizer.min_lr > optimizer.lr:
        refuse(recipe, "optimizer.min_lr", f"above optimizer.lr={optimizer.lr}; lower one or raise the other")
    if len(optimizer.betas) != 2:
        refuse(recipe, "optimizer.betas", "must be two numbers")
    if schedule.decay is Decay.wsd and schedule.warmup_fraction + schedule.decay_fraction > 1:
        refuse(
            recipe,
            "schedule.decay_fraction",
            f"with schedule.warmup_fraction={schedule.warmup_fraction} more than the whole run; lower one",
        )


def _world(recipe: Recipe, world_size: int) -> None:
    parallel, schedule = recipe.parallel, recipe.schedule
    needed = processes(parallel)
    if world_size % needed:
        axes = {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "context": parallel.context,
            "expert": parallel.expert,
            "expert_tensor": parallel.expert_tensor,
        }
        layout = " ".join(f"parallel.{axis}={ways}" for axis, ways in axes.items() if ways > 1)
        verb = "process runs" if world_size == 1 else "processes run"
        raise UserError(
            f"{layout}: needs {needed} processes or a multiple, but {world_size} {verb}; "
            f"launch with: omni-train launch {needed} …"
        )
    data_ranks = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    keys = ["schedule.global_batch"] + (["schedule.eval_rows"] if schedule.eval_every else [])
    divides(recipe, data_ranks, "data-parallel ranks", *keys)
    if parallel.virtual_pipeline > 1:
        for key in keys:
            rows = value(recipe, key) // data_ranks
            if rows % parallel.pipeline:
                refuse(
                    recipe,
                    key,
                    f"gives {rows} rows to each data rank, which with parallel.virtual_pipeline="
                    f"{parallel.virtual_pipeline} must be a multiple of parallel.pipeline={parallel.pipeline}",
                )
    loaders = data_ranks * max(recipe.data.workers, 1)
    divides(recipe, loaders, "data-parallel ranks·data.workers", "data.streams")


def _packages(recipe: Recipe) -> None:
    """Refuse choices that need optional packages which this machine lacks."""
    if recipe.evaluation.normalizer is Normalizer.whisper and find_spec("whisper_normalizer") is None:
        refuse(
            recipe,
            "evaluation.normalizer",
            "needs the package whisper-normalizer; install the extra [whisper] or use evaluation.normalizer=basic",
        )
    if recipe.optimizer.name is OptimizerName.muon and find_spec("emerging_optimizers") is None:
        refuse(
            recipe,
            "optimizer.name",
            "needs the package emerging-optimizers; install the extra [muon] or use optimizer=adamw",
        )
    if recipe.tracking.mode is not WandbMode.disabled and find_spec("wandb") is None:
        refuse(recipe, "tracking.mode", "needs the package wandb; pip install it or use tracking=none")
