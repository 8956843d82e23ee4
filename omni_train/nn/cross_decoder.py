"""Layers of a decoder that attends to an encoder's outputs: packed sequences, each with a clip of its own.

Linear layers go over the tokens packed; only attention sees them padded, so that no position outside of a sequence is
computed but there.

Axis letters: T tokens, A tokens of the encoder, N sequences, L the longest of them, H hidden, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Spans:
    """Where the packed tokens of N sequences stand once they are padded to the longest.

    Args:
        lengths: of each sequence, above 0.
        device: of the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        lengths_N = torch.tensor(lengths)
        self.count, self.longest = len(lengths), max(lengths)
        starts_N = lengths_N.cumsum(0) - lengths_N
        offsets = torch.arange(sum(lengths)) - starts_N.repeat_interleave(lengths_N)
        sequences = torch.arange(self.count).repeat_interleave(lengths_N)
        self.offsets = offsets.to(device)  # (T,) of each token in its sequence
        self.places = (sequences * self.longest + offsets).to(device)  # (T,) in the padded (N·L,)
        even = min(lengths) == self.longest
        self.mask = None if even else (torch.arange(self.longest) < lengths_N[:, None]).to(device)  # (N, L)

    def pad(self, x_TH: Tensor) -> Tensor:
        """(T, H) -> (N, L, H), zero where there is no token."""
        padded = x_TH.new_zeros(self.count * self.longest, x_TH.shape[1]).index_copy(0, self.places, x_TH)
        return padded.view(self.count, self.longest, -1)

    def unpad(self, x_NLH: Tensor) -> Tensor:
        """(N, L, H) -> (T, H)."""
        return x_NLH.flatten(0, 1).index_select(0, self.places)


@dataclass
class Heard:
    """The encoder's outputs (A, H), and which of them are whose."""

    hidden: Tensor
    spans: Spans


class Past:
    """What a layer keeps of hypotheses that grow by a token at a time; those of a clip share what they heard."""

    def __init__(self) -> None:
        self.length = 0
        self.own: tuple[Tensor, Tensor] | None = None  # keys and values (hypotheses, heads, length, K)
        self.heard: tuple[Tensor, Tensor] | None = None  # keys and values (clips, heads, L, K)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of one more token of each hypothesis; all of them."""
        if self.own is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.own, (keys, values), strict=True))
        self.own = keys, values
        self.length = keys.shape[2]
        return self.own

    def choose(self, hypotheses: Tensor) -> None:
        """Go on from these, (hypotheses,), each in the place of one of its own clip."""
        if self.own is not None:
            keys, values = self.own
            self.own = keys.index_select(0, hypotheses), values.index_select(0, hypotheses)


class SelfAttention(torch.nn.Module):
    """Causal, within each sequence."""

    def __init__(self, hidden_size: int, heads: int, where: dict) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(hidden_size, 3 * hidden_size, **where)
        self.output = torch.nn.Linear(hidden_size, hidden_size, **where)

    def forward(self, x: Tensor, spans: Spans, past: Past | None) -> Tensor:
        """(T, H) -> (T, H); with `past`, of one token of each hypothesis."""
        qkv = self.qkv(x)
        padded = spans.pad(qkv) if past is None else qkv[:, None]
        queries, keys, values = (_split(part, self.heads) for part in padded.chunk(3, -1))
        if past is not None:
            keys, values = past.append(keys, values)
        # Padding comes after all tokens of its sequence, which a causal mask alone keeps from seeing it.
        out = _merge(F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None))
        return self.output(spans.unpad(out) if past is None else out.squeeze(1))


class CrossAttention(torch.nn.Module):
    """From each sequence to the whole of its own clip."""

    def __init__(self, hidden_size: int, heads: int, encoder_size: int, where: dict) -> None:
        super().__init__()
        self.heads = heads
        self.query = torch.nn.Linear(hidden_size, hidden_size, **where)
        self.key_value = torch.nn.Linear(encoder_size, 2 * hidden_size, **where)
        self.output = torch.nn.Linear(hidden_size, hidden_size, **where)

    def forward(self, x: Tensor, spans: Spans, heard: Heard, past: Past | None) -> Tensor:
        """(T, H) -> (T, H)."""
        pair = past.heard if past is not None else None
        if pair is None:
            padded = heard.spans.pad(self.key_value(heard.hidden))
            pair = tuple(_split(part, self.heads) for part in padded.chunk(2, -1))
        if past is not None:
            past.heard = pair
        mask = heard.spans.mask
        queries = _split(spans.pad(self.query(x)), self.heads)
        out = F.scaled_dot_product_attention(queries, *pair, attn_mask=None if mask is None else mask[:, None, None])
        return self.output(spans.unpad(_merge(out)))


class DecoderLayer(torch.nn.Module):
    """Self-attention, cross-attention and an MLP, each behind its norm and beside a residual path.

    Args:
        hidden_size, heads, intermediate_size: of the decoder.
        encoder_size: width of what it attends to.
        where: device and dtype.
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

    def forward(self, x: Tensor, spans: Spans, heard: Heard, past: Past | None = None) -> Tensor:
        """(T, H) -> (T, H) of sequences, or of one token of each hypothesis where there is a `past`.

        Args:
            x: tokens.
            spans: the tokens of each clip: its sequence, or its hypotheses.
            heard: what the encoder made of the clips.
            past: of this layer.
        """
        x = x + self.self_attention(self.self_norm(x), spans, past)
        x = x + self.cross_attention(self.cross_norm(x), spans, heard, past)
        return x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))


def _split(x_NLH: Tensor, heads: int) -> Tensor:
    """(N, L, H) -> (N, heads, L, K)."""
    return x_NLH.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """(N, heads, L, K) -> (N, L, H)."""
    return x.transpose(1, 2).flatten(2)
