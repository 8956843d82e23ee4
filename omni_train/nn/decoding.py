"""What the layers remember of sequences that are being written, token by token.

Axis letters: T tokens of the row, N sequences, H query heads, K key/value heads, L tokens remembered, D head dimension.
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
    """The boundaries of a row's sequences, and what each layer keeps of them for the tokens to come.

    It stands where ``packed_seq_params`` does, so only the layers that mix tokens know of it. The first row through the
    model holds whole sequences without padding; :meth:`advance` comes before each later row, which holds one token of
    each sequence.
    """

    sequence: torch.Tensor | None = None  # (T,) the sequence of each token of the row
    place: torch.Tensor | None = None  # (T,) its place in the sequence
    longest: int = 0  # tokens of the longest sequence, this row's included
    single: bool = False  # one token of each sequence, after those remembered
    memories: dict[torch.nn.Module, object] = field(default_factory=dict)  # by layer, each kind its own

    @classmethod
    def begin(cls, packed: PackedSeqParams) -> DecodingState:
        """The state for a first row with these boundaries."""
        starts, lengths = packed.cu_seqlens_q[:-1].long(), packed.cu_seqlens_q.diff().long()
        sequence_T = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_kv=packed.cu_seqlens_kv,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_kv=packed.max_seqlen_kv,
            sequence=sequence_T,
            place=torch.arange(len(sequence_T), device=lengths.device) - starts[sequence_T],
            longest=packed.max_seqlen_q,
        )

    def advance(self) -> None:
        """The next row holds one more token of each sequence."""
        if not self.single:
            self.place = self.cu_seqlens_q.diff().long() - 1
            self.sequence = torch.arange(len(self.place), device=self.place.device)
            self.cu_seqlens_q = self.cu_seqlens_kv = torch.arange(
                len(self.place) + 1, dtype=torch.int32, device=self.place.device
            )
            self.max_seqlen_q = self.max_seqlen_kv = 1
            self.single = True
        self.place = self.place + 1
        self.longest += 1

    def remember(self, layer: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the row's keys and values (T, K, D) of an attention layer."""
        if layer not in self.memories:
            self.memories[layer] = KeyValueCache(len(self.cu_seqlens_q) - 1, self.longest, key)
        self.memories[layer].write(key, value, self.sequence, self.place, self.longest)

    def attend(self, layer: torch.nn.Module, query: torch.Tensor) -> torch.Tensor:
        """Attention of one query for each sequence (N, H, D) to all that `layer` remembers of it -> (N, H, D)."""
        cache = self.memories[layer]
        key, value = cache.keys_values[:, :, :, : self.longest]
        seen = torch.arange(self.longest, device=query.device) <= self.place[:, None]
        # The queries that share a head of keys stand where the queries of a longer sequence would.
        grouped = query.view(len(query), key.shape[1], -1, query.shape[-1])
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen[:, None, None])
        return out.reshape(query.shape)


class KeyValueCache:
    """Keys and values of N sequences in one block, (2, N, K, L, D), with room to grow.

    Args:
        sequences: N.
        length: L to begin with.
        like: keys (T, K, D) of the same layer.
    """

    def __init__(self, sequences: int, length: int, like: torch.Tensor) -> None:
        self.keys_values = like.new_zeros(2, sequences, like.shape[1], length, like.shape[2])

    def write(self, key, value, sequence_T: torch.Tensor, place_T: torch.Tensor, longest: int) -> None:
        """Put the keys and values (T, K, D) of tokens at their places, none of which is past `longest`."""
        if longest > (length := self.keys_values.shape[3]):
            self.keys_values = F.pad(self.keys_values, (0, 0, 0, max(longest, int(length * GROWTH)) - length))
        for kept, new in zip(self.keys_values, (key, value), strict=True):
            kept[sequence_T, :, place_T] = new
