"""From a recipe's model to Megatron's configuration and layer pattern."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from omni_train.recipe.schema import ModelConfig, ParallelConfig, Precision, Recipe, Recompute


def split_pattern(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """The layers of each pipeline (and virtual pipeline) stage, in the order of the model.

    A pattern with its own ``|`` is taken as written; otherwise the layers are cut evenly. Validation has refused what
    does not divide.
    """
    if "|" in model.pattern:
        return model.pattern.split("|")
    layers = model.pattern * model.repeats
    stages = parallel.pipeline * parallel.virtual_pipeline
    length = len(layers) // stages
    return [layers[i * length : (i + 1) * length] for i in range(stages)]


def params_dtype(precision: Precision) -> torch.dtype:
    """Type of the parameters and activations."""
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def transformer_config(recipe: Recipe):
    """Megatron's ``TransformerConfig`` of the recipe's Thinker.

    Args:
        recipe: a validated recipe.
    """
    from megatron.core.transformer import TransformerConfig

    model, parallel = recipe.model, recipe.parallel
    dtype = params_dtype(recipe.precision)
    options: dict = {}
    if model.num_experts:
        options |= dict(
            num_moe_experts=model.num_experts,
            moe_router_topk=model.num_experts_per_tok,
            moe_ffn_hidden_size=model.moe_intermediate_size,
            moe_router_dtype="fp32",
            moe_router_pre_softmax=False,  # softmax over the chosen = softmax over all, chosen, renormalised
            moe_router_load_balancing_type="none",  # ours is BalancedRouter's
            moe_token_dispatcher_type="alltoall",
            moe_shared_expert_intermediate_size=model.shared_expert_intermediate_size or None,
            moe_shared_expert_gate=model.shared_expert_intermediate_size > 0,
        )
    if recipe.recompute is Recompute.full:
        options |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif recipe.recompute is Recompute.selective:
        modules = ["core_attn"] + (["moe"] if model.num_experts else [])
        options |= dict(recompute_granularity="selective", recompute_modules=modules)
    if parallel.virtual_pipeline > 1:
        # Batched send/receive between the same two ranks in both directions mixes up messages.
        options |= dict(
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
    return TransformerConfig(
        num_layers=len(model.pattern.replace("|", "")) * model.repeats,
        is_hybrid_model=True,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size or model.moe_intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        attention_output_gate=model.attention_output_gate,
        qk_layernorm=True,
        linear_conv_kernel_dim=model.linear_conv_kernel_dim,
        linear_key_head_dim=model.linear_key_head_dim,
        linear_value_head_dim=model.linear_value_head_dim,
        linear_num_key_heads=model.linear_num_key_heads,
        linear_num_value_heads=model.linear_num_value_heads,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        layernorm_epsilon=model.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.initializer_range,
        mtp_num_layers=model.mtp_num_hidden_layers or None,
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
