"""Megatron's configuration of networks: types of parameters, recomputation, a stack, an encoder without a Thinker."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from omni_train.recipe.schema import ParallelConfig, Precision, Recipe, Recompute, StackConfig


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


def split_pattern(stack: StackConfig, parallel: ParallelConfig) -> list[str]:
    """Layer pattern of each pipeline (and virtual pipeline) stage, in the order of the model.

    A pattern with its own ``|`` is taken as written; otherwise the layers are divided evenly. Validation has refused
    what does not divide.
    """
    if "|" in stack.pattern:
        return stack.pattern.split("|")
    layers = stack.pattern * stack.repeats
    stages = parallel.pipeline * parallel.virtual_pipeline
    length = len(layers) // stages
    return [layers[i * length : (i + 1) * length] for i in range(stages)]


def stack_config(recipe: Recipe, stack: StackConfig, mtp_layers: int = 0):
    """Megatron's ``TransformerConfig`` of a decoder-only stack.

    Args:
        recipe: a validated recipe.
        stack: its layers.
        mtp_layers: multi-token-prediction layers behind them.
    """
    from megatron.core.transformer import TransformerConfig

    parallel = recipe.parallel
    dtype = params_dtype(recipe.precision)
    options: dict = {}
    if stack.num_experts:
        options |= dict(
            num_moe_experts=stack.num_experts,
            moe_router_topk=stack.num_experts_per_tok,
            moe_ffn_hidden_size=stack.moe_intermediate_size,
            moe_router_dtype="fp32",
            moe_router_pre_softmax=False,  # softmax over the chosen = softmax over all, chosen, renormalised
            moe_router_load_balancing_type="none",  # ours is BalancedRouter's
            moe_aux_loss_coeff=stack.router_aux_loss_coef,  # per token of the global batch
            moe_token_dispatcher_type="alltoall",
            moe_shared_expert_intermediate_size=stack.shared_expert_intermediate_size or None,
            moe_shared_expert_gate=stack.shared_expert_intermediate_size > 0,
        )
    options |= recomputation(recipe.recompute, ["core_attn"] + (["moe"] if stack.num_experts else []))
    if parallel.virtual_pipeline > 1:
        # Batched send/receive between the same two ranks in both directions mixes up messages.
        options |= dict(
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
    return TransformerConfig(
        num_layers=len(stack.pattern.replace("|", "")) * stack.repeats,
        is_hybrid_model=True,
        hidden_size=stack.hidden_size,
        ffn_hidden_size=stack.intermediate_size or stack.moe_intermediate_size,
        num_attention_heads=stack.num_attention_heads,
        num_query_groups=stack.num_key_value_heads,
        kv_channels=stack.head_dim,
        attention_output_gate=stack.attention_output_gate,
        qk_layernorm=True,
        linear_conv_kernel_dim=stack.linear_conv_kernel_dim,
        linear_key_head_dim=stack.linear_key_head_dim,
        linear_value_head_dim=stack.linear_value_head_dim,
        linear_num_key_heads=stack.linear_num_key_heads,
        linear_num_value_heads=stack.linear_num_value_heads,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=stack.zero_centered_norm,
        layernorm_epsilon=stack.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=recipe.model.initializer_range,
        mtp_num_layers=mtp_layers or None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        variable_seq_lengths=False,
        calculate_per_token_loss=True,  # sums over tokens; the engine divides once, by the whole batch
        deallocate_pipeline_outputs=True,
        **options,
    )
