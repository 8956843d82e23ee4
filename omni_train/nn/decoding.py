"""Decoding state of the Thinker: what each layer keeps of sequences that grow by a token at a time.

`state` is everywhere what a network carries from call to call, `prefill` the call that reads what is given, and `step`
one more token of each sequence. Attention layers keep a KV cache, Gated DeltaNet layers their recurrent and convolution
states (:class:`omni_train.nn.gated_delta_net.RecurrentState`).

Axis letters: T tokens of the row, N sequences, H query heads, K key/value heads, L tokens in the cache, D head
dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

GROWTH = 1.5
"""Factor by which a full cache grows: what is copied stays proportional to what is written."""


@dataclass(eq=False)
class DecodingState(PackedSeqParams):
    """Sequence boundaries of a packed row, with the decoding state of every layer.

    It stands where ``packed_seq_params`` does, so only the layers that mix tokens know of it. The row of the prefill
    holds whole sequences without padding; :meth:`step` comes before each later row, which holds one token of each
    sequence.
    """

    sequence_ids: torch.Tensor | None = None  # (T,) int64: sequence of each token of the row
    positions: torch.Tensor | None = None  # (T,) int64: index of the token in its sequence
    max_length: int = 0  # tokens of the longest sequence, this row's included
    is_prefill: bool = True  # False once the row holds one token of each sequence
    layer_states: dict[torch.nn.Module, PackedKVCache | object] = field(default_factory=dict)

    @classmethod
    def prefill(cls, packed: PackedSeqParams) -> DecodingState:
        """State before the prefill of a row with these boundaries."""
        starts, lengths = packed.cu_seqlens_q[:-1].long(), packed.cu_seqlens_q.diff().long()
        sequence_T = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_kv=packed.cu_seqlens_kv,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_kv=packed.max_seqlen_kv,
            sequence_ids=sequence_T,
            positions=torch.arange(len(sequence_T), device=lengths.device) - starts[sequence_T],
            max_length=packed.max_seqlen_q,
        )

    def step(self) -> None:
        """Move on to a row that holds one more token of each sequence."""
        if self.is_prefill:
            self.positions = self.cu_seqlens_q.diff().long() - 1
            self.sequence_ids = torch.arange(len(self.positions), device=self.positions.device)
            self.cu_seqlens_q = self.cu_seqlens_kv = torch.arange(
                len(self.positions) + 1, dtype=torch.int32, device=self.positions.device
            )
            self.max_seqlen_q = self.max_seqlen_kv = 1
            self.is_prefill = False
        self.positions = self.positions + 1
        self.max_length += 1

    def append_kv(self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Append the row's keys and values (T, K, D) to the KV cache of an attention layer."""
        if layer not in self.layer_states:
            self.layer_states[layer] = PackedKVCache(len(self.cu_seqlens_q) - 1, self.max_length, key)
        self.layer_states[layer].write(key, value, self.sequence_ids, self.positions, self.max_length)

    def attend(self, layer: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
        """Attention of one query of each sequence to the KV cache of `layer`, (N, H, D) -> (N, H, D)."""
        cache = self.layer_states[layer]
        key, value = cache.keys_values[:, :, :, : self.max_length]
        mask_NL = torch.arange(self.max_length, device=query.device) <= self.positions[:, None]
        # The queries that share a head of keys stand where the queries of a longer sequence would.
        grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask_NL[:, None, None])
        return out.reshape(query.shape)


class PackedKVCache:
    """KV cache of N sequences of an attention layer in one block, (2, N, K, L, D), with room to grow.

    Args:
        sequences: N.
        length: L to begin with.
        like: keys (T, K, D) of the same layer, for K, D, type and device.
    """

    def __init__(self, sequences: int, length: int, like: torch.Tensor) -> None:
        self.keys_values = like.new_zeros(2, sequences, like.shape[1], length, like.shape[2])

    def write(self, key, value, sequence_T: torch.Tensor, position_T: torch.Tensor, max_length: int) -> None:
        """Write the keys and values (T, K, D) of tokens at their positions, all of them below `max_length`."""
        if max_length > (length := self.keys_values.shape[3]):
            self.keys_values = F.pad(self.keys_values, (0, 0, 0, max(max_length, int(length * GROWTH)) - length))
        for kept, new in zip(self.keys_values, (key, value), strict=True):
            kept[sequence_T, :, position_T] = new
