"""Bidirectional pre-norm Transformers for encoders, and their projectors, from Megatron's layers.

They are tensor-parallel inside; inputs and outputs are the same on all tensor-parallel ranks. There is neither
sequence nor context parallelism: an encoder's row is short, and the Thinker shares clips and images over its
context-parallel ranks instead.

Axis letters: T tokens, N sequences, H hidden, R rotary dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from omni_train.nn.attention import PackedSelfAttention
from omni_train.nn.backend import backend
from omni_train.nn.norm import LayerNorm
from omni_train.nn.recompute import checkpoint


def encoder_config(
    thinker: TransformerConfig,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int = 1,
    num_attention_heads: int | None = None,
    activation: Callable[[Tensor], Tensor] = F.gelu,
    norm_eps: float = 1e-5,
) -> TransformerConfig:
    """Megatron's configuration of an encoder, with the precision, tensor parallelism and recomputation of a Thinker.

    Args:
        thinker: configuration of the Thinker.
        hidden_size: H.
        intermediate_size: width of the MLP.
        num_layers: number of layers.
        num_attention_heads: None for a projector, which has no attention.
        activation: of the MLP.
        norm_eps: added to the variance in LayerNorm.
    """
    recompute = thinker.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=intermediate_size,
        num_attention_heads=num_attention_heads or thinker.tensor_model_parallel_size,
        kv_channels=hidden_size // num_attention_heads if num_attention_heads else 1,
        normalization="LayerNorm",
        layernorm_epsilon=norm_eps,
        activation_func=activation,
        gated_linear_unit=False,
        add_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=thinker.init_method_std,
        params_dtype=thinker.params_dtype,
        bf16=thinker.bf16,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=thinker.tensor_model_parallel_size,
        sequence_parallel=False,
        context_parallel_size=1,
        calculate_per_token_loss=True,
        **(dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1) if recompute else {}),
    )


def _layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Spec of a pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x))."""
    kernels = backend()
    attention = ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=SelfAttentionSubmodules(
            linear_qkv=kernels.column_linear,
            core_attention=kernels.core_attention,
            linear_proj=kernels.row_linear,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=partial(MLP.as_mlp_submodule, submodules=_mlp_submodules(), ffn_hidden_size=config.ffn_hidden_size),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mlp_submodules() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=backend().column_linear, linear_fc2=backend().row_linear)


class ShardedModuleList(torch.nn.ModuleList):
    """Module list with a sharded state dict; Megatron would take a plain one for replicated."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Sharded state dict of all modules, under their indices."""
        state = {}
        for index, module in enumerate(self):
            state |= sharded_state_dict_default(module, f"{prefix}{index}.", sharded_offsets, metadata)
        return state


class EncoderLayers(ShardedModuleList):
    """Transformer layers of an encoder.

    Args:
        config: from :func:`encoder_config`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(
            build_module(
                _layer_spec(config),
                config=config,
                layer_number=number + 1,
                pg_collection=groups,
                add_layer_offset=False,
            )
            for number in range(config.num_layers)
        )
        self.recompute = config.recompute_granularity == "full"

    def forward(
        self, hidden: Tensor, lengths: Sequence[int], rotary: Tensor | None = None, keep: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states after all layers; tokens attend within their sequence.

        Args:
            hidden: (T, H).
            lengths: tokens of each of the N sequences, which sum to T.
            rotary: (T, 1, R) R/2 cosines followed by R/2 sines, for :func:`omni_train.nn.rotary.apply_rotary`.
            keep: indices, from 0, of layers whose outputs to return too.

        Returns:
            (T, H) of the last layer, and (T, H) of each layer in `keep`.
        """
        # Sorted by length, sequences of equal length are one batch for attention.
        lengths_N = torch.tensor(lengths)
        by_length = lengths_N.argsort(stable=True)
        order = token_order(lengths_N, by_length).to(hidden.device)
        lengths_N = lengths_N[by_length]
        longest = int(lengths_N[-1])
        boundaries = F.pad(lengths_N.cumsum(0, dtype=torch.int32), (1, 0)).to(hidden.device)
        packed = PackedSeqParams("thd", boundaries, boundaries, max_seqlen_q=longest, max_seqlen_kv=longest)
        hidden = hidden.index_select(0, order).unsqueeze(1)
        if rotary is not None:
            rotary = rotary.index_select(0, order)
        kept = {}
        for index, layer in enumerate(self):
            run = partial(layer, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed)
            if self.recompute and self.training:
                hidden, _ = checkpoint(run, hidden)
            else:
                hidden, _ = run(hidden)
            if index in keep:
                kept[index] = hidden
        back = order.argsort()
        hidden, *kept = (x.squeeze(1).index_select(0, back) for x in (hidden, *(kept[index] for index in keep)))
        return hidden, kept


def token_order(lengths_N: Tensor, order_N: Tensor) -> Tensor:
    """Indices that permute the packed tokens of sequences as the sequences are permuted.

    Args:
        lengths_N: tokens of each sequence.
        order_N: the sequences in their new order.

    Returns:
        (T,) int64: ``tokens[indices]`` is in the new order.
    """
    starts_N = lengths_N.cumsum(0) - lengths_N
    moved_N = lengths_N[order_N]
    shift_N = starts_N[order_N] - (moved_N.cumsum(0) - moved_N)
    return torch.arange(int(lengths_N.sum())) + shift_N.repeat_interleave(moved_N)


class Projector(MLP):
    """Projector from an encoder's width to the Thinker's: Linear, exact GELU, Linear, as wide inside as its input.

    Args:
        thinker: configuration of the Thinker.
        input_size: width of the input.
    """

    def __init__(self, thinker: TransformerConfig, input_size: int) -> None:
        super().__init__(
            encoder_config(thinker, hidden_size=thinker.hidden_size, intermediate_size=input_size),
            _mlp_submodules(),
            input_size=input_size,
            ffn_hidden_size=input_size,
            tp_group=ProcessGroupCollection.use_mpu_process_groups().tp,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project, (T, input_size) -> (T, hidden size of the Thinker)."""
        out, bias = super().forward(x)
        return out + bias
