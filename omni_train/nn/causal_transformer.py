"""Causal Transformer with sliding-window attention over frames of audio, whole or streaming.

Plain torch, without Megatron: the networks that use it are small, and sharded by ZeRO.

Axis letters: B batch, T frames, S frames of the keys, H hidden, N heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.nn.waveform import StreamingState


class CausalTransformer(torch.nn.Module):
    """Causal Transformer of pre-norm layers with rotary embedding, LayerScale and sliding-window attention.

    Args:
        hidden_size: H.
        num_layers: number of layers.
        num_heads: N.
        num_kv_heads: K, a divisor of N.
        head_dim: D.
        intermediate_size: width of the MLP.
        window: frames that a frame attends to, itself included.
        rope_theta: base of the rotary frequencies.
        layer_scale: initial value of LayerScale.
        eps: of the norms.
        gated: True: RMSNorm, gated SiLU, and a norm after the last layer (Code2Wav). False: LayerNorm, exact GELU and
            no last norm (Mimi).
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        window: int,
        rope_theta: float,
        layer_scale: float,
        eps: float,
        gated: bool,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = head_dim, rope_theta
        norm = torch.nn.RMSNorm if gated else torch.nn.LayerNorm
        mlp = GatedMLP if gated else MLP
        self.layers = torch.nn.ModuleList(
            Layer(
                attention=SlidingWindowAttention(hidden_size, num_heads, num_kv_heads, head_dim, window),
                mlp=mlp(hidden_size, intermediate_size),
                norms=(norm(hidden_size, eps=eps), norm(hidden_size, eps=eps)),
                scales=(LayerScale(hidden_size, layer_scale), LayerScale(hidden_size, layer_scale)),
            )
            for _ in range(num_layers)
        )
        self.norm = norm(hidden_size, eps=eps) if gated else torch.nn.Identity()

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        """Hidden states after the last layer, (B, T, H) -> (B, T, H).

        Args:
            x: frames.
            state: streaming state, where the frames come in pieces of any lengths.
        """
        start = 0
        if state is not None:
            start = state.get(self, 0)
            state[self] = start + x.shape[1]
        rotary = rotary_angles(x.shape[1], start, self.head_dim, self.rope_theta, x.dtype, x.device)
        for layer in self.layers:
            x = layer(x, rotary, state)
        return self.norm(x)


class Layer(torch.nn.Module):
    """Transformer layer: x + scale(attention(norm(x))), then x + scale(mlp(norm(x)))."""

    def __init__(self, attention, mlp, norms, scales) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = norms
        self.attention_scale, self.mlp_scale = scales

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: StreamingState | None = None) -> Tensor:
        """Output of the layer, (B, T, H) -> (B, T, H)."""
        x = x + self.attention_scale(self.attention(self.attention_norm(x), rotary, state))
        return x + self.mlp_scale(self.mlp(self.mlp_norm(x)))


class LayerScale(torch.nn.Module):
    """LayerScale (Touvron et al. 2021, section 2): a learned factor for each channel of the last axis."""

    def __init__(self, hidden_size: int, initial: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((hidden_size,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """Scale, (…, H) -> (…, H)."""
        return self.scale * x


class MLP(torch.nn.Module):
    """MLP without biases: Linear, exact GELU, Linear."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = torch.nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the MLP, (…, H) -> (…, H)."""
        return self.down(F.gelu(self.up(x)))


class GatedMLP(torch.nn.Module):
    """SwiGLU MLP without biases: down(SiLU(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = torch.nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = torch.nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the MLP, (…, H) -> (…, H)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SlidingWindowAttention(torch.nn.Module):
    """Causal attention over the last `window` frames, with grouped queries and rotary embedding over whole heads.

    Args: as :class:`CausalTransformer`.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.window = num_heads, num_kv_heads, head_dim, window
        self.query = torch.nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key = torch.nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.value = torch.nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.output = torch.nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], state: StreamingState | None = None) -> Tensor:
        """Attend to the last `window` frames, (B, T, H) -> (B, T, H)."""
        B, T, _ = x.shape
        query = _rotate(self.query(x).view(B, T, self.num_heads, -1).transpose(1, 2), rotary)
        key = _rotate(self.key(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2), rotary)
        value = self.value(x).view(B, T, self.num_kv_heads, -1).transpose(1, 2)
        if state is not None:
            if self in state:
                key, value = (torch.cat(pair, dim=2) for pair in zip(state[self], (key, value), strict=True))
            first = max(0, key.shape[2] - self.window + 1)  # the next frame attends to no earlier one
            state[self] = key[:, :, first:], value[:, :, first:]
        if (groups := self.num_heads // self.num_kv_heads) > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        out = window_attention(query, key, value, self.window)
        return self.output(out.transpose(1, 2).reshape(B, T, -1))


def window_attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Softmax attention of each frame to the last `window` frames, itself included.

    Args:
        query: (B, N, T, D).
        key, value: (B, N, S, D), S ≥ T: the queries are the last T of S frames.
        window: number of frames.

    Returns:
        (B, N, T, D).
    """
    T, S = query.shape[2], key.shape[2]
    if window >= S:
        if T == S:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        if T == 1:
            return F.scaled_dot_product_attention(query, key, value)
    if T < S or 2 * window >= S:
        return F.scaled_dot_product_attention(query, key, value, _band(T, S, window, query.device))
    # In blocks as long as the window, each attending to itself and the one before: the cost grows as T, not T².
    blocks = -(-T // window)
    query, key, value = (
        F.pad(x, (0, 0, 0, blocks * window - T)).unflatten(2, (blocks, window)).transpose(1, 2)
        for x in (query, key, value)
    )
    first = F.scaled_dot_product_attention(query[:, :1], key[:, :1], value[:, :1], is_causal=True)
    pairs = (torch.cat([x[:, :-1], x[:, 1:]], dim=3) for x in (key, value))
    rest = F.scaled_dot_product_attention(query[:, 1:], *pairs, _band(window, 2 * window, window, query.device))
    return torch.cat([first, rest], dim=1).transpose(1, 2).flatten(2, 3)[:, :, :T]


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a cached tensor must serve training too
def _band(T: int, S: int, window: int, device: torch.device) -> Tensor:
    """Attention mask of a sliding window, (T, S) bool: the last T of S frames."""
    back = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
    return (back >= 0) & (back < window)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rotary_angles(
    length: int, start: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of positions `start` to `start` + `length` − 1, (length, head_dim) each.

    Computed in fp32, and not kept as a buffer, which converting a model to bf16 would convert.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = (positions[:, None] * (1.0 / theta**exponents)).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embedding to (B, N, T, D), dimension i together with i + D/2."""
    cosine, sine = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
