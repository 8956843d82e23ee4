"""Layers of the hybrid stack as Megatron's specs."""

from __future__ import annotations

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from omni_train.nn.attention import PackedSelfAttention
from omni_train.nn.backend import Backend
from omni_train.nn.gated_delta_net import DecodingGatedDeltaNet
from omni_train.nn.moe import moe_spec

A_INIT_RANGE = (0.01, 16.0)
"""Range of the uniform draw whose logarithm A_log of Gated DeltaNet starts as. Megatron's own begins at 1."""


def stack_submodules(backend: Backend) -> HybridStackSubmodules:
    """Specs of the layers in a pattern of G (Gated DeltaNet), * (attention), E (MoE) and - (dense MLP)."""
    common = {"norm": backend.norm, "column_linear": backend.column_linear, "row_linear": backend.row_linear}
    return HybridStackSubmodules(
        gdn_layer=gdn_layer_spec(**common, out_norm=backend.plain_norm),
        attention_layer=attention_layer_spec(**common, core_attention=backend.core_attention),
        moe_layer=moe_spec(**common),
        mlp_layer=mlp_layer_spec(**common),
    )


def attention_layer_spec(*, norm, column_linear, row_linear, core_attention) -> ModuleSpec:
    """Spec of an attention layer: norm, self-attention with norms on each head's query and key, residual.

    The output gate, the norms on queries and keys and the heads come from the configuration
    (``attention_output_gate``, ``qk_layernorm``, ``num_attention_heads``, ``num_query_groups``, ``kv_channels``).
    """
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column_linear,
            core_attention=core_attention,
            linear_proj=row_linear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return _token_mixing_layer(norm, attention)


def gdn_layer_spec(*, norm, column_linear, row_linear, out_norm) -> ModuleSpec:
    """Spec of a Gated DeltaNet layer: norm, Gated DeltaNet, residual. `out_norm` is the gated norm, a plain one."""
    delta_net = ModuleSpec(
        module=DecodingGatedDeltaNet,
        params={"A_init_range": A_INIT_RANGE},
        submodules=GatedDeltaNetSubmodules(in_proj=column_linear, out_norm=out_norm, out_proj=row_linear),
    )
    return _token_mixing_layer(norm, delta_net)


def mlp_layer_spec(*, norm, column_linear, row_linear) -> ModuleSpec:
    """Spec of a dense MLP layer: norm, MLP (gated where the configuration says so), residual."""
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=partial(
                MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _token_mixing_layer(norm, mixer: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm, self_attention=mixer, self_attn_bda=get_bias_dropout_add
        ),
    )
