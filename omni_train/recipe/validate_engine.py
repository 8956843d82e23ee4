"""Validation of the engine, with the network, the layout and other choices; a part of the one validation pass."""

from __future__ import annotations

from omni_train.recipe.networks import network_of
from omni_train.recipe.refusals import refuse, value
from omni_train.recipe.schema import EngineName, OptimizerName, Precision, Recipe

_AXES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")


def check_engine(recipe: Recipe) -> None:
    """Refuse a network on an engine that does not train it, and choices that the engine does not support.

    Raises:
        UserError: the first thing found, in one line.
    """
    engines = network_of(recipe.network).engines
    if recipe.engine not in engines:
        refuse(recipe, "engine", f"does not train network={recipe.network}; set engine={engines[0]}")
    if recipe.engine is EngineName.megatron:
        if recipe.optimizer.ema_decay:
            refuse(recipe, "optimizer.ema_decay", "only engine=deepspeed averages weights; set 0")
        return
    for axis in _AXES:
        if value(recipe, f"parallel.{axis}") > 1:
            refuse(recipe, f"parallel.{axis}", f"engine=deepspeed has data ranks alone; set parallel.{axis}=1")
    if recipe.optimizer.name is OptimizerName.muon:
        refuse(recipe, "optimizer.name", "engine=deepspeed trains with adamw; set optimizer=adamw")
    if recipe.zero.stage == 0 and recipe.precision is Precision.bf16:
        refuse(recipe, "zero.stage", "precision=bf16 keeps its fp32 weights in ZeRO's optimizer; set 1, 2 or 3")
    if recipe.zero.stage == 0 and recipe.zero.offload_optimizer:
        refuse(recipe, "zero.offload_optimizer", "zero.stage=0 has no optimizer of ZeRO's; set a stage from 1 to 3")
