"""Parameter groups, freezing, and the optimizer with its guarded step."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from omni_train.errors import UserError
from omni_train.recipe.schema import OptimizerConfig, OptimizerName, Recipe

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

Named = Iterable[tuple[str, torch.nn.Parameter]]
"""(name, parameter) pairs, named as recipes match them: in the whole model, without wrappers."""


def freeze(named: Named, trainable: list[str]) -> None:
    """Freeze all parameters whose names match none of the patterns; must be called before the model is wrapped.

    Args:
        named: parameters of the model on this rank.
        trainable: glob patterns of the names of parameters to train.

    Raises:
        UserError: a pattern matches no parameter on any rank.
    """
    matched = dict.fromkeys(trainable, False)
    for name, parameter in named:
        hits = [pattern for pattern in trainable if fnmatch.fnmatchcase(name, pattern)]
        matched.update(dict.fromkeys(hits, True))
        parameter.requires_grad_(bool(hits))
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, matched)
    for pattern in trainable:
        if not any(rank[pattern] for rank in everywhere):
            raise UserError(
                f"trainable: the pattern '{pattern}' matches no parameter; see the names in docs/recipes.md"
            )


def _never_decayed(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() < 2 or name.endswith((".bias", "A_log", "dt_bias"))


def _factors(config: OptimizerConfig, name: str, parameter: torch.nn.Parameter) -> tuple[float, float]:
    """Factors of a parameter on learning rate and weight decay."""
    decay = 0.0 if _never_decayed(name, parameter) else 1.0
    for group in config.groups:
        if fnmatch.fnmatchcase(name, group.match):
            return group.lr_factor, decay * group.weight_decay_factor
    return 1.0, decay


def parameter_groups(config: OptimizerConfig, named: Named) -> list[dict]:
    """The trained parameters in groups of equal factors, as torch's optimizers take them."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(_factors(config, name, parameter), []).append(parameter)
    return [{"params": members, "lr_mult": lr, "wd_mult": wd} for (lr, wd), members in groups.items()]


def build_optimizer(recipe: Recipe, chunks: list[torch.nn.Module], named: Named) -> MegatronOptimizer:
    """Megatron's distributed optimizer over wrapped model chunks, in the recipe's parameter groups.

    It is AdamW, with Muon beside it for the matrices that :func:`omni_train.training.engines.muon.mark_matrices` has
    marked.

    Args:
        recipe: a validated recipe.
        chunks: this rank's model chunks.
        named: parameters of the chunks.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import ParamKey, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

    from omni_train import platform
    from omni_train.checkpoint.distributed_optimizer import adapt
    from omni_train.models.config import params_dtype

    config = recipe.optimizer
    dtype = params_dtype(recipe.precision)
    overrides = {}
    factors = {parameter: _factors(config, name, parameter) for name, parameter in named if parameter.requires_grad}
    for pair in sorted({*factors.values()} - {(1.0, 1.0)}):
        matches = ParamWithNamePredicate(
            name=f"lr_factor={pair[0]},weight_decay_factor={pair[1]}",
            fn=lambda parameter, name, pair=pair: factors.get(parameter) == pair,
        )
        overrides[ParamKey(with_name_predicate=matches)] = {"lr_mult": pair[0], "wd_mult": pair[1]}
    options = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    if config.name is OptimizerName.muon:
        from omni_train.training.engines.muon import build_with_muon

        optimizer = build_with_muon(options, chunks, overrides)
    else:
        optimizer = get_megatron_optimizer(
            options, chunks, config_overrides=overrides, use_gloo_process_groups=platform.has_cuda()
        )
    adapt(optimizer)
    return optimizer


def set_learning_rate(groups: list[dict], learning_rate: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of every parameter group, times the group's factors."""
    for group in groups:
        group["lr"] = learning_rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def guarded_step(optimizer: MegatronOptimizer, loss: float, clip_grad: float) -> tuple[float, bool]:
    """Clip the gradients and step, unless the loss or a gradient is not finite.

    Returns:
        (global L2 norm of the gradients before clipping, whether the parameters were updated).
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm() or 0.0)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return norm, False
    if clip_grad > 0.0:
        _scale_gradients(optimizer, min(1.0, clip_grad / (norm + 1e-6)))
    optimizer.step_with_ready_grads()
    return norm, True


def _scale_gradients(optimizer: MegatronOptimizer, factor: float) -> None:
    if factor == 1.0:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad if parameter.grad is not None else getattr(parameter, "decoupled_grad", None)
            if gradient is not None:
                gradient.mul_(factor)
