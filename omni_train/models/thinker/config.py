"""Megatron's configuration and layer pattern of a recipe's Thinker."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from omni_train.models.config import params_dtype, recomputation
from omni_train.recipe.schema import ParallelConfig, Recipe, ThinkerConfig


def split_pattern(thinker: ThinkerConfig, parallel: ParallelConfig) -> list[str]:
    """Layer pattern of each pipeline (and virtual pipeline) stage, in the order of the model.

    A pattern with its own ``|`` is taken as written; otherwise the layers are divided evenly. Validation has refused
    what does not divide.
    """
    if "|" in thinker.pattern:
        return thinker.pattern.split("|")
    layers = thinker.pattern * thinker.repeats
    stages = parallel.pipeline * parallel.virtual_pipeline
    length = len(layers) // stages
    return [layers[i * length : (i + 1) * length] for i in range(stages)]


def transformer_config(recipe: Recipe):
    """Megatron's ``TransformerConfig`` of the recipe's Thinker.

    Args:
        recipe: a validated recipe.
    """
    from megatron.core.transformer import TransformerConfig

    thinker, parallel = recipe.model.thinker, recipe.parallel
    dtype = params_dtype(recipe.precision)
    options: dict = {}
    if thinker.num_experts:
        options |= dict(
            num_moe_experts=thinker.num_experts,
            moe_router_topk=thinker.num_experts_per_tok,
            moe_ffn_hidden_size=thinker.moe_intermediate_size,
            moe_router_dtype="fp32",
            moe_router_pre_softmax=False,  # softmax over the chosen = softmax over all, chosen, renormalised
            moe_router_load_balancing_type="none",  # ours is BalancedRouter's
            moe_aux_loss_coeff=thinker.router_aux_loss_coef,  # per token of the global batch
            moe_token_dispatcher_type="alltoall",
            moe_shared_expert_intermediate_size=thinker.shared_expert_intermediate_size or None,
            moe_shared_expert_gate=thinker.shared_expert_intermediate_size > 0,
        )
    options |= recomputation(recipe.recompute, ["core_attn"] + (["moe"] if thinker.num_experts else []))
    if parallel.virtual_pipeline > 1:
        # Batched send/receive between the same two ranks in both directions mixes up messages.
        options |= dict(
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        )
    return TransformerConfig(
        num_layers=len(thinker.pattern.replace("|", "")) * thinker.repeats,
        is_hybrid_model=True,
        hidden_size=thinker.hidden_size,
        ffn_hidden_size=thinker.intermediate_size or thinker.moe_intermediate_size,
        num_attention_heads=thinker.num_attention_heads,
        num_query_groups=thinker.num_key_value_heads,
        kv_channels=thinker.head_dim,
        attention_output_gate=thinker.attention_output_gate,
        qk_layernorm=True,
        linear_conv_kernel_dim=thinker.linear_conv_kernel_dim,
        linear_key_head_dim=thinker.linear_key_head_dim,
        linear_value_head_dim=thinker.linear_value_head_dim,
        linear_num_key_heads=thinker.linear_num_key_heads,
        linear_num_value_heads=thinker.linear_num_value_heads,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=thinker.zero_centered_norm,
        layernorm_epsilon=thinker.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=recipe.model.initializer_range,
        mtp_num_layers=thinker.mtp_num_hidden_layers or None,
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
