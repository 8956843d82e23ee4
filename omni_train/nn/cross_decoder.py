"""Decoder layers with cross-attention to an encoder's output: packed sequences, each with a clip of its own.

Linear layers run over the packed tokens; only attention runs over padded ones, so that padding costs nothing elsewhere.

Axis letters: T tokens, A tokens of the encoder, N sequences, L the longest of them, H hidden, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Spans:
    """Indices of the tokens of N packed sequences in a batch padded to the longest of them.

    Args:
        lengths: tokens of each sequence, at least 1.
        device: device of the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        lengths_N = torch.tensor(lengths)
        self.count, self.longest = len(lengths), max(lengths)
        starts_N = lengths_N.cumsum(0) - lengths_N
        offsets = torch.arange(sum(lengths)) - starts_N.repeat_interleave(lengths_N)
        sequences = torch.arange(self.count).repeat_interleave(lengths_N)
        self.offsets = offsets.to(device)  # (T,) position of each token in its sequence
        self.indices = (sequences * self.longest + offsets).to(device)  # (T,) of each token in the padded (N·L,)
        even = min(lengths) == self.longest
        self.mask = None if even else (torch.arange(self.longest) < lengths_N[:, None]).to(device)  # (N, L)

    def pad(self, x_TH: Tensor) -> Tensor:
        """Packed to padded: (T, H) -> (N, L, H), zero where there is no token."""
        padded = x_TH.new_zeros(self.count * self.longest, x_TH.shape[1]).index_copy(0, self.indices, x_TH)
        return padded.view(self.count, self.longest, -1)

    def unpad(self, x_NLH: Tensor) -> Tensor:
        """Padded to packed: (N, L, H) -> (T, H)."""
        return x_NLH.flatten(0, 1).index_select(0, self.indices)


@dataclass
class EncoderOutput:
    """Output of an encoder over N clips."""

    hidden: Tensor  # (A, H), clip after clip
    spans: Spans  # audio tokens of each clip


class KVCache:
    """KV cache of one decoder layer: of each hypothesis for self-attention, of each clip for cross-attention."""

    def __init__(self) -> None:
        self.length = 0  # tokens of each hypothesis
        self.self_kv: tuple[Tensor, Tensor] | None = None  # keys and values (hypotheses, heads, length, K)
        self.cross_kv: tuple[Tensor, Tensor] | None = None  # keys and values (clips, heads, L, K)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of one more token of each hypothesis.

        Args:
            keys, values: (hypotheses, heads, 1, K).

        Returns:
            keys and values of all tokens so far, (hypotheses, heads, length, K).
        """
        if self.self_kv is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.self_kv, (keys, values), strict=True))
        self.self_kv = keys, values
        self.length = keys.shape[2]
        return self.self_kv

    def reorder(self, hypotheses: Tensor) -> None:
        """Continue from other hypotheses, as beam search chose them.

        Args:
            hypotheses: (hypotheses,) int64, each the index of a hypothesis of the same clip.
        """
        if self.self_kv is not None:
            keys, values = self.self_kv
            self.self_kv = keys.index_select(0, hypotheses), values.index_select(0, hypotheses)


class SelfAttention(torch.nn.Module):
    """Causal multi-head self-attention within each sequence."""

    def __init__(self, hidden_size: int, heads: int, where: dict) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(hidden_size, 3 * hidden_size, **where)
        self.output = torch.nn.Linear(hidden_size, hidden_size, **where)

    def forward(self, x: Tensor, spans: Spans, cache: KVCache | None) -> Tensor:
        """Attend within each sequence, (T, H) -> (T, H); with `cache` the tokens are the next of each hypothesis."""
        qkv = self.qkv(x)
        padded = spans.pad(qkv) if cache is None else qkv[:, None]
        queries, keys, values = (_split(part, self.heads) for part in padded.chunk(3, -1))
        if cache is not None:
            keys, values = cache.append(keys, values)
        # Padding comes after all tokens of its sequence, which a causal mask alone keeps from seeing it.
        out = _merge(F.scaled_dot_product_attention(queries, keys, values, is_causal=cache is None))
        return self.output(spans.unpad(out) if cache is None else out.squeeze(1))


class CrossAttention(torch.nn.Module):
    """Multi-head cross-attention from each sequence to the encoder's output for its own clip."""

    def __init__(self, hidden_size: int, heads: int, encoder_size: int, where: dict) -> None:
        super().__init__()
        self.heads = heads
        self.query = torch.nn.Linear(hidden_size, hidden_size, **where)
        self.key_value = torch.nn.Linear(encoder_size, 2 * hidden_size, **where)
        self.output = torch.nn.Linear(hidden_size, hidden_size, **where)

    def forward(self, x: Tensor, spans: Spans, encoder_output: EncoderOutput, cache: KVCache | None) -> Tensor:
        """Attend to the clips, (T, H) -> (T, H); with `cache` the clips' keys and values are computed once."""
        pair = cache.cross_kv if cache is not None else None
        if pair is None:
            padded = encoder_output.spans.pad(self.key_value(encoder_output.hidden))
            pair = tuple(_split(part, self.heads) for part in padded.chunk(2, -1))
        if cache is not None:
            cache.cross_kv = pair
        mask = encoder_output.spans.mask
        queries = _split(spans.pad(self.query(x)), self.heads)
        out = F.scaled_dot_product_attention(queries, *pair, attn_mask=None if mask is None else mask[:, None, None])
        return self.output(spans.unpad(_merge(out)))


class DecoderLayer(torch.nn.Module):
    """Decoder layer with norms in front: self-attention, cross-attention and an MLP (Vaswani et al. 2017, section 3.1).

    Args:
        hidden_size: H of the decoder.
        heads: attention heads.
        intermediate_size: width of the MLP.
        encoder_size: H of the encoder.
        where: device and dtype of the parameters.
    """

    def __init__(self, hidden_size: int, heads: int, intermediate_size: int, encoder_size: int, where: dict) -> None:
        super().__init__()
        self.self_norm = torch.nn.LayerNorm(hidden_size, **where)
        self.self_attention = SelfAttention(hidden_size, heads, where)
        self.cross_norm = torch.nn.LayerNorm(hidden_size, **where)
        self.cross_attention = CrossAttention(hidden_size, heads, encoder_size, where)
        self.mlp_norm = torch.nn.LayerNorm(hidden_size, **where)
        self.fc1 = torch.nn.Linear(hidden_size, intermediate_size, **where)
        self.fc2 = torch.nn.Linear(intermediate_size, hidden_size, **where)

    def forward(self, x: Tensor, spans: Spans, encoder_output: EncoderOutput, cache: KVCache | None = None) -> Tensor:
        """Hidden states after this layer, (T, H) -> (T, H).

        Args:
            x: hidden states of whole sequences, or with `cache` of one token of each hypothesis.
            spans: tokens of each clip: those of its sequence, or one of each of its hypotheses.
            encoder_output: the encoded clips.
            cache: this layer's KV cache, for decoding.
        """
        x = x + self.self_attention(self.self_norm(x), spans, cache)
        x = x + self.cross_attention(self.cross_norm(x), spans, encoder_output, cache)
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


def _split(x_NLH: Tensor, heads: int) -> Tensor:
    """(N, L, H) -> (N, heads, L, K)."""
    return x_NLH.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """(N, heads, L, K) -> (N, L, H)."""
    return x.transpose(1, 2).flatten(2)
