"""One pass over a recipe that refuses what cannot work, before anything is allocated.

Each refusal is one line: the key and its value, what is wrong, what to do. docs/recipes.md has the table.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from math import lcm

from omni_train.errors import UserError
from omni_train.recipe.refusals import bounds, divides, finite, refuse, value
from omni_train.recipe.schema import (
    ChatTemplate,
    Decay,
    LossOn,
    Normalizer,
    OptimizerName,
    ParallelConfig,
    Precision,
    Recipe,
    WandbMode,
)
from omni_train.recipe.validate_codec import check_codec
from omni_train.recipe.validate_engine import check_engine
from omni_train.recipe.validate_media import check_media
from omni_train.recipe.validate_recognition import check_recognition

# The least value of each number, `None` values passing.
_AT_LEAST = {
    "seed": 0,
    "loss_chunk_tokens": 1,
    "model.vocab_size": 1,
    "model.hidden_size": 1,
    "model.repeats": 1,
    "model.num_attention_heads": 1,
    "model.num_key_value_heads": 1,
    "model.head_dim": 1,
    "model.linear_num_key_heads": 0,
    "model.linear_num_value_heads": 0,
    "model.linear_key_head_dim": 1,
    "model.linear_value_head_dim": 1,
    "model.linear_conv_kernel_dim": 1,
    "model.intermediate_size": 0,
    "model.num_experts": 0,
    "model.num_experts_per_tok": 0,
    "model.moe_intermediate_size": 0,
    "model.shared_expert_intermediate_size": 0,
    "model.router_aux_loss_coef": 0,
    "model.mtp_num_hidden_layers": 0,
    "model.mtp_loss_weight": 0,
    "model.max_position_embeddings": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.context": 1,
    "parallel.expert": 1,
    "parallel.expert_tensor": 1,
    "data.row_tokens": 1,
    "data.alignment": 1,
    "data.streams": 1,
    "data.workers": 0,
    "data.shuffle_buffer": 0,
    "data.packing_buffer": 1,
    "data.max_skip_fraction": 0,
    "optimizer.min_lr": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 0,
    "schedule.steps": 0,
    "schedule.tokens": 1,
    "schedule.global_batch": 1,
    "schedule.warmup_fraction": 0,
    "schedule.decay_fraction": 0,
    "schedule.log_every": 1,
    "schedule.eval_every": 0,
    "schedule.eval_rows": 1,
    "schedule.stop_after": 1,
    "evaluation.every": 0,
    "evaluation.samples": 1,
    "evaluation.max_new_tokens": 1,
    "evaluation.print_samples": 0,
    "checkpoint.save_every": 1,
    "checkpoint.keep": 0,
    "checkpoint.max_failures": 1,
    "tracking.expert_load_every": 0,
    "safety.max_nonfinite_steps": 0,
    "safety.hang_seconds": 1,
}
_ABOVE_ZERO = (
    "model.rope_theta",
    "model.partial_rotary_factor",
    "model.rms_norm_eps",
    "model.initializer_range",
    "optimizer.lr",
    "optimizer.eps",
)
_AT_MOST = {
    "model.partial_rotary_factor": 1,
    "model.mtp_num_hidden_layers": 1,
    "data.max_skip_fraction": 1,
    "seed": 2**62,  # ranks count on from it, and 64 bits hold it
    "schedule.warmup_fraction": 1,
    "schedule.decay_fraction": 1,
}
_NOT_EMPTY = ("run", "runs_dir", "trainable", "data.path", "data.tokenizer", "data.sources", "model.pattern")


def validate(recipe: Recipe, world_size: int | None) -> None:
    """Refuse a recipe that cannot run.

    Args:
        recipe: composed, every key typed.
        world_size: processes that will run it on this machine or cluster; None skips what depends on them and on the
            packages installed here, so that a recipe for a cluster can be checked anywhere.

    Raises:
        UserError: the first thing found, in one line.
    """
    _values(recipe)
    _model(recipe)
    _layout(recipe)
    check_media(recipe)
    check_recognition(recipe)
    check_engine(recipe)
    check_codec(recipe)
    _rows(recipe)
    _optimization(recipe)
    if world_size is not None:
        _world(recipe, world_size)
        _packages(recipe)


def processes(parallel: ParallelConfig) -> int:
    """The smallest world that the layout runs on."""
    return parallel.pipeline * lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)


def _values(recipe: Recipe) -> None:
    finite(asdict(recipe))
    bounds(recipe, at_least=_AT_LEAST, above_zero=_ABOVE_ZERO, at_most=_AT_MOST)
    for key in _NOT_EMPTY:
        if not value(recipe, key):
            refuse(recipe, key, "must not be empty")


def _model(recipe: Recipe) -> None:
    model = recipe.model
    if foreign := set(model.pattern) - set("G*E-|"):
        refuse(recipe, "model.pattern", f"{min(foreign)!r} is no layer; use G, *, E, - and | between stages")
    if "|" in model.pattern and model.repeats != 1:
        refuse(recipe, "model.repeats", "a pattern with | is the whole model; write the layers out and repeats=1")
    if "E" in model.pattern:
        for key in ("model.num_experts", "model.num_experts_per_tok", "model.moe_intermediate_size"):
            if not value(recipe, key):
                refuse(recipe, key, f"model.pattern={model.pattern} has MoE layers (E); give {key}")
        if model.num_experts_per_tok > model.num_experts:
            refuse(recipe, "model.num_experts_per_tok", f"more than model.num_experts={model.num_experts}")
    elif model.num_experts:
        refuse(recipe, "model.num_experts", f"model.pattern={model.pattern} has no MoE layer (E); set 0")
    if "-" in model.pattern and not model.intermediate_size:
        refuse(recipe, "model.intermediate_size", f"model.pattern={model.pattern} has dense MLPs (-); give their width")
    divides(recipe, model.num_key_value_heads, "model.num_key_value_heads", "model.num_attention_heads")
    if "G" in model.pattern:
        for key in ("model.linear_num_key_heads", "model.linear_num_value_heads"):
            if not value(recipe, key):
                refuse(recipe, key, f"model.pattern={model.pattern} has Gated DeltaNet layers (G); give {key}")
        divides(recipe, model.linear_num_key_heads, "model.linear_num_key_heads", "model.linear_num_value_heads")
    rotary = model.head_dim * model.partial_rotary_factor
    if rotary % 2:
        refuse(
            recipe,
            "model.partial_rotary_factor",
            f"rotates {rotary:g} of model.head_dim={model.head_dim}; must be even",
        )
    if len(model.mrope_section) != 3 or min(model.mrope_section) < 0 or sum(model.mrope_section) != rotary // 2:
        refuse(
            recipe,
            "model.mrope_section",
            f"must be 3 numbers (T, H, W) that sum to half the rotary dims, {rotary / 2:g}",
        )


def _layout(recipe: Recipe) -> None:
    """What of the model each axis of the layout must divide."""
    model, parallel = recipe.model, recipe.parallel
    divides(recipe, parallel.tensor, "parallel.tensor", "model.vocab_size", "model.num_attention_heads")
    # Megatron gives several tensor ranks one key-value head each where there are fewer heads than ranks.
    if max(parallel.tensor, model.num_key_value_heads) % min(parallel.tensor, model.num_key_value_heads):
        refuse(
            recipe,
            "parallel.tensor",
            f"neither divides nor is a multiple of model.num_key_value_heads={model.num_key_value_heads}",
        )
    widths = ("model.intermediate_size", "model.shared_expert_intermediate_size")
    divides(recipe, parallel.tensor, "parallel.tensor", *widths)
    # Gated DeltaNet turns context ranks into head ranks by an all-to-all, so its heads are split over both.
    heads = ("model.linear_num_key_heads", "model.linear_num_value_heads")
    if "G" in model.pattern:
        divides(recipe, parallel.tensor * parallel.context, "parallel.tensor·parallel.context", *heads)
    if model.num_experts:
        divides(recipe, parallel.expert, "parallel.expert", "model.num_experts")
        divides(recipe, parallel.expert_tensor, "parallel.expert_tensor", "model.moe_intermediate_size")
        # The experts' grouped product reads rows of whole 16-byte words.
        word = 8 if recipe.precision is Precision.bf16 else 4
        divides(recipe, word, f"what precision={recipe.precision} needs", "model.hidden_size")
        divides(
            recipe,
            word * parallel.expert_tensor,
            f"parallel.expert_tensor times what precision={recipe.precision} needs",
            "model.moe_intermediate_size",
        )
    for key in ("parallel.expert", "parallel.expert_tensor"):
        if value(recipe, key) > 1 and not model.num_experts:
            refuse(recipe, key, f"model={model.name} has no experts; set {key}=1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        refuse(recipe, "parallel.virtual_pipeline", "needs parallel.pipeline of at least 2; set it to 1 or add stages")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if "|" in model.pattern:
        if (marked := model.pattern.count("|") + 1) != stages:
            refuse(recipe, "model.pattern", f"marks {marked} stages but parallel.pipeline·virtual_pipeline={stages}")
        if "" in model.pattern.split("|"):
            refuse(recipe, "model.pattern", "has a stage without layers; move the |")
    elif (layers := len(model.pattern) * model.repeats) % stages:
        refuse(
            recipe,
            "parallel.pipeline",
            f"{layers} layers (model.pattern×repeats) are not a multiple of pipeline·virtual_pipeline={stages}; "
            "choose a divisor or mark the stages with | in model.pattern",
        )
    for key in ("parallel.pipeline", "parallel.context"):
        if recipe.evaluation.every and value(recipe, key) > 1:
            refuse(
                recipe, key, f"evaluation.every={recipe.evaluation.every} generates, which needs 1; set one of the two"
            )


def _rows(recipe: Recipe) -> None:
    """The length of a row, its alignment and the blend it is made from."""
    data, parallel = recipe.data, recipe.parallel
    if parallel.context > 1:
        divides(recipe, 2 * parallel.context, "2·parallel.context", "data.alignment")
        pieces = 2 * parallel.context * parallel.tensor
        divides(recipe, pieces, "2·parallel.context·parallel.tensor", "data.row_tokens")
    divides(recipe, data.alignment, "data.alignment", "data.row_tokens")
    divides(recipe, parallel.tensor, "parallel.tensor", "data.row_tokens")
    if data.row_tokens > (most := recipe.model.max_position_embeddings):
        refuse(recipe, "data.row_tokens", f"longer than model.max_position_embeddings={most}; shorten the rows")
    if data.chat_template is ChatTemplate.qwen3_5 and data.loss_on is LossOn.all:
        refuse(
            recipe,
            "data.loss_on",
            "with data.chat_template=qwen3_5 a chat is learned once for each of its questions; set "
            "data.loss_on=assistant",
        )
    for i, source in enumerate(data.sources):
        if source.weight <= 0:
            raise UserError(f"data.sources[{i}].weight={source.weight}: must be above 0; leave the source out instead")


def _optimization(recipe: Recipe) -> None:
    optimizer, schedule = recipe.optimizer, recipe.schedule
    if optimizer.min_lr > optimizer.lr:
        refuse(recipe, "optimizer.min_lr", f"above optimizer.lr={optimizer.lr}; lower one or raise the other")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        refuse(recipe, "optimizer.betas", "must be two numbers from 0 to below 1")
    for i, group in enumerate(optimizer.groups):
        for name in ("lr_factor", "weight_decay_factor"):
            if getattr(group, name) < 0:
                raise UserError(f"optimizer.groups[{i}].{name}={getattr(group, name)}: must be at least 0")
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
            f"launch with: launchers/local.sh {needed} …"
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
    """Optional packages that the recipe's choices need on this machine."""
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
