"""Configuration that all networks share: type of the parameters, recomputation, an encoder without a Thinker."""

from __future__ import annotations

from typing import Any

import torch

from omni_train.recipe.schema import Precision, Recipe, Recompute


def params_dtype(precision: Precision) -> torch.dtype:
    """Type of parameters and activations in a precision."""
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def recomputation(recompute: Recompute, modules: list[str]) -> dict[str, Any]:
    """Options of Megatron's ``TransformerConfig`` for activation recomputation.

    Args:
        recompute: how much is recomputed.
        modules: Megatron's names of the modules that ``selective`` recomputes.
    """
    if recompute is Recompute.full:
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    if recompute is Recompute.selective:
        return dict(recompute_granularity="selective", recompute_modules=modules)
    return {}


def lone_encoder_config(recipe: Recipe):
    """Megatron's ``TransformerConfig`` for an audio encoder without a Thinker.

    Args:
        recipe: a validated recipe with `model.audio`.
    """
    from megatron.core.transformer import TransformerConfig

    dtype = params_dtype(recipe.precision)
    return TransformerConfig(
        num_layers=recipe.model.audio.num_hidden_layers,
        hidden_size=recipe.model.audio.hidden_size,
        num_attention_heads=recipe.model.audio.num_attention_heads,
        init_method_std=recipe.model.initializer_range,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=recipe.parallel.tensor,
        **recomputation(recipe.recompute, ["core_attn"]),
    )
