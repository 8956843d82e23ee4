"""Repairs of Megatron's distributed optimizer: its state is saved and restored completely and correctly."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.package_info import MAJOR, MINOR, PATCH, __shortversion__

from omni_train import platform
from omni_train.errors import UserError


def adapt(optimizer: MegatronOptimizer) -> None:
    """Repair Megatron's optimizer for checkpoints, where it is a distributed one; must be called before its use."""
    logging.getLogger(distrib_optimizer.__name__).addFilter(_refuse_wrong_offsets)
    for part in _distributed_parts(optimizer):
        _number_parameters(part)
        _keep_settings(part)
        if isinstance(part.optimizer, torch.optim.AdamW):
            _adapt_torch_adamw(part)
        # Fixed in Megatron-LM by pull request 5077 (commit 32a03b77c5), which no release up to this one has.
        if (MAJOR, MINOR, PATCH) <= (0, 19, 2):
            _correct_offsets(part)


def restore(optimizer: MegatronOptimizer, state: dict, checkpoint: Path) -> None:
    """Load the state of an optimizer, after the model has its weights. Collective.

    Raises:
        UserError: the master weights in it are not the model's weights, as :func:`_correct_offsets` explains.
    """
    parts = list(_distributed_parts(optimizer))
    weights = [shard for part in parts for shard in chain(*part.shard_float16_groups)]
    masters = [shard for part in parts for shard in chain(*part.shard_fp32_from_float16_groups)]
    # Weights in fp32 are their own masters.
    in_place = [shard for part in parts for shard in chain(*part.shard_fp32_groups)]
    weights += [shard.detach().clone() for shard in in_place]
    optimizer.load_state_dict(state)
    # Equal but for the rounding to bf16, also where weights of one precision are read in the other.
    equal = (
        torch.isclose(weight.float(), master, rtol=2**-8, atol=1e-30, equal_nan=True).all()
        for weight, master in zip(weights, [*masters, *in_place], strict=True)
    )
    wrong = torch.tensor(float(not all(equal)), device=platform.device())
    torch.distributed.all_reduce(wrong, op=torch.distributed.ReduceOp.MAX)
    if wrong:
        raise UserError(
            f"{checkpoint}: its optimizer state is not that of its weights, an error of Megatron 0.19.2 with several "
            f"gradient buckets; start a new run from its weights, with init_from={checkpoint}"
        )


def _distributed_parts(optimizer: MegatronOptimizer) -> Iterator[DistributedOptimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
            yield part


def _correct_offsets(part: DistributedOptimizer) -> None:
    """Correct the offsets of parameters with which an optimizer makes its `fully_reshardable` state.

    Megatron 0.19.2 gathers the buckets of a gradient buffer without the padding at their ends, and then cuts out the
    parameters at their offsets in the padded buffer. So masters and moments of all that follows the first padded bucket
    are those of other elements. What it reads goes by parameters, and is right.
    """
    make_state = part.sharded_param_state_fully_reshardable

    def make_state_from_unpadded_buffers(*args: Any, **options: Any) -> dict:
        with _unpadded(part.buffers):
            return make_state(*args, **options)

    part.sharded_param_state_fully_reshardable = make_state_from_unpadded_buffers


@contextmanager
def _unpadded(buffers: list) -> Iterator[None]:
    """Context in which the offsets of parameters in each buffer are as if its buckets had no padding."""
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = list(accumulate(padding, initial=0))
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, padded, strict=True):
            buffer.param_index_map = offsets


def _refuse_wrong_offsets(record: logging.LogRecord) -> bool:
    """Logging filter that refuses Megatron's warning of wrong offsets: what it then writes cannot be resumed."""
    if "param range exceeds" in record.getMessage():
        raise UserError(
            f"megatron-core {__shortversion__} would write optimizer state at wrong offsets ({record.getMessage()}); "
            "install megatron-core==0.19.2, with which omni_train corrects them"
        )
    return True


def _number_parameters(part: DistributedOptimizer) -> None:
    """Number parameters by their places in the groups, by which checkpoints look up their states.

    Megatron puts a group's fp32 parameters before the others, and numbers all in the order of their gradient buffers.
    """
    for group, parameters in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for place, parameter in enumerate(chain(*parameters)):
            part.model_param_group_index_map[parameter] = (group, place)


def _keep_settings(part: DistributedOptimizer) -> None:
    """Let an optimizer keep its own rates, betas and the like when it loads a checkpoint.

    Megatron looks for a group's state by its peak learning rate, so that one that has changed is not found; and the
    groups become those of the run that wrote the checkpoint.
    """
    load = part.load_state_dict

    def load_without_settings(state_dict: dict) -> None:
        # Equal in all groups, but for factors that find them.
        own: dict[str, Any] = next(iter(part.optimizer.param_groups), {})
        settings = {key: own[key] for key in _SETTINGS if key in own}
        saved = state_dict.get("optimizer", {})
        if "param_groups" in saved:
            groups = [group | settings for group in saved["param_groups"]]
            state_dict = state_dict | {"optimizer": saved | {"param_groups": groups}}
        load(state_dict)

    part.load_state_dict = load_without_settings


_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"""Settings of a parameter group that the recipe fixes. Learning rate and weight decay are set at every step."""


def _adapt_torch_adamw(part: DistributedOptimizer) -> None:
    """Make torch's AdamW, which Megatron takes without Transformer Engine, fused and fit to save and load its state."""
    inner, restore_one, load = part.optimizer, part._set_main_param_and_optimizer_states, part.load_state_dict
    make_state_dict = part.state_dict

    def fuse() -> None:
        """Fuse the update: one pass over each parameter instead of one per operation."""
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False

    fuse()
    # Megatron asks for the state, step count included, before the first step, which is when torch would make it.
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # as the fused update needs it
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    # Megatron reads the step count off the parameters, and a pipeline stage may train none.
    def state_dict_with_a_step() -> dict:
        if inner.state:
            return make_state_dict()
        inner.state["none"] = {"step": torch.zeros(())}
        try:
            return make_state_dict()
        finally:
            del inner.state["none"]

    # The step count is kept apart: it must not be looked for among a parameter's loaded tensors.
    def restore_without_step(parameter: torch.nn.Parameter, tensors: dict) -> None:
        restore_one(parameter, {"step": None, **tensors})

    # Megatron gives all parameters one step tensor, on the host, which each would then advance; and the groups become
    # those of the run that wrote the checkpoint, perhaps with another Adam.
    def load_with_steps_of_their_own(state_dict: dict) -> None:
        load(state_dict)
        fuse()
        for parameter, state in inner.state.items():
            state["step"] = state["step"].to(parameter.device, copy=True)

    part.state_dict = state_dict_with_a_step
    part._set_main_param_and_optimizer_states = restore_without_step
    part.load_state_dict = load_with_steps_of_their_own
