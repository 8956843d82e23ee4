"""Self-attention over packed rows, with grouped key/value heads, output gate, KV cache and context parallelism.

Axis letters: T tokens, H query heads, K key/value heads, D head dimension, R rotary dimensions.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from omni_train.errors import UserError
from omni_train.nn.context_parallel import context_key_indices, context_restore_indices
from omni_train.nn.decoding import DecodingState
from omni_train.nn.packed_attention import packed_bidirectional_attention, packed_causal_attention
from omni_train.nn.rotary import apply_rotary


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention for packed rows, with rotary embeddings given token by token.

    Overrides the forward pass only: parameters, their sharding and their names are Megatron's.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unsupported,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within each sequence of the row.

        Args:
            hidden_states: (T, 1, hidden), or this rank's part of it under sequence parallelism.
            attention_mask: None, the boundaries say it all.
            rotary_pos_emb: (T, 1, R) from :class:`omni_train.nn.rotary.TMRotaryEmbedding`.
            packed_seq_params: boundaries of the sequences in the whole row; a :class:`DecodingState` also holds
                this layer's KV cache.

        Returns:
            hidden states of the same shape, and the output projection's bias, which is None without one.

        Raises:
            NotImplementedError: another of Megatron's arguments is given, such as an inference context.
        """
        for name, argument in unsupported.items():
            if argument is not None:
                raise NotImplementedError(f"PackedSelfAttention: {name} must be None")
        query, key, value, *gate = self.get_query_key_value_tensors(
            hidden_states, output_gate=self.config.attention_output_gate
        )
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if rotary_pos_emb is not None:
            query, key = apply_rotary(query, rotary_pos_emb), apply_rotary(key, rotary_pos_emb)

        state = packed_seq_params if isinstance(packed_seq_params, DecodingState) else None
        if state is not None:
            state.append_kv(self, key, value)
        if state is not None and not state.is_prefill:
            out = state.attend(self, query)
        else:
            recompute = self.checkpoint_core_attention and self.training
            attend = self._checkpointed_attention_forward if recompute else self._run_core_attention
            out = attend(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                packed_seq_params=packed_seq_params,
            )
        out = out.reshape(out.shape[0], 1, -1)
        if gate:
            out = (out * gate[0].reshape(out.shape).float().sigmoid()).to(out.dtype)
        return self.linear_proj(out)


class PackedAttention(MegatronModule):
    """Core attention in plain torch within each sequence of a packed row: causal, with any number of key/value heads,
    or in both directions (`AttnMaskType.padding`, for encoders).

    Under context parallelism each rank gathers the keys and values of all ranks, which works for any number of
    key/value heads, and attends from its two pieces of each sequence to the keys up to the end of each.

    Takes the keywords with which Megatron builds its ``core_attention``.

    Raises:
        UserError: dropout, a window, another softmax or another kind of attention is configured, or context parallelism
            for an encoder.
    """

    def __init__(
        self,
        *,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection,
    ) -> None:
        super().__init__(config=config)
        for name, supported in (("attention_dropout", 0.0), ("window_size", None), ("softmax_type", "vanilla")):
            if (value := getattr(config, name)) != supported:
                raise UserError(f"{name}={value}: must be {supported} with packed attention in plain torch")
        if attention_type != "self" or attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding):
            raise UserError(
                f"{attn_mask_type.name} {attention_type} attention: must be causal or padding self-attention with "
                "packed attention in plain torch"
            )
        self.causal = attn_mask_type is AttnMaskType.causal
        if not self.causal and config.context_parallel_size > 1:
            raise UserError(
                f"context_parallel_size={config.context_parallel_size}: must be 1 unless attention is causal"
            )
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        /,
        *,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams,
        attention_bias: None = None,
    ) -> torch.Tensor:
        """Attention of this rank's tokens: (T, H, D) queries, (T, K, D) keys and values -> (T, H, D)."""
        boundaries_q = boundaries_k = packed_seq_params.cu_seqlens_q
        longest = packed_seq_params.max_seqlen_kv
        if not self.causal:
            return packed_bidirectional_attention(query, key, value, boundaries_q, self.softmax_scale, longest)
        if (size := self.context_group.size()) > 1:
            key_indices, boundaries_q, boundaries_k = context_key_indices(boundaries_k, self.context_group.rank(), size)
            key_indices = context_restore_indices(packed_seq_params.cu_seqlens_q, size)[key_indices]
            both = gather_from_sequence_parallel_region(torch.stack([key, value], dim=1), group=self.context_group)
            key, value = both.index_select(0, key_indices).unbind(1)
        return packed_causal_attention(query, key, value, boundaries_q, boundaries_k, self.softmax_scale, longest)
