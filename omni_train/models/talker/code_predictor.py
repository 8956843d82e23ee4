"""Code predictor: the residual codes of a frame from its codebook 0 and the Talker's hidden state (Qwen3-Omni, CSM).

A causal Transformer over the codebooks of one frame, which reads [h, e0(c0), e1(c1), …]. All residual codes are learned
in one parallel pass; only generation takes them in turn.

Axis letters: F frames, Q codebooks, G = Q − 1 residual codebooks, K codewords, H width of the Talker, P width of the
predictor, N heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from omni_train import platform
from omni_train.data.rows.batch import IGNORE
from omni_train.nn.backend import backend
from omni_train.nn.recompute import checkpoint
from omni_train.nn.rotary import TMRotaryEmbedding, apply_rotary
from omni_train.recipe.schema.talker import CodePredictorConfig, TalkerConfig

FRAMES_AT_ONCE = 32768
"""Frames of one pass. They are the batch of attention, whose CUDA kernels take at most 65,535."""

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values, (F, heads, codebooks so far, D), of each layer."""


class ResidualEmbedding(MegatronModule):
    """Embeddings of the residual codes: all that the first pipeline stage needs of the code predictor.

    Args:
        talker: sizes.
        config: Megatron's configuration of the Talker.
    """

    def __init__(self, talker: TalkerConfig, config) -> None:
        super().__init__(config)
        self.num_residuals, self.codebook_size = talker.num_code_groups - 1, talker.codebook_size
        shape = (self.num_residuals, self.codebook_size, talker.hidden_size)
        self.embeddings = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=platform.device()))
        self._initialize()

    def _initialize(self) -> None:
        """Draw initial values, and mark the parameters: replicated, but each rank sees frames of its own."""
        for name, parameter in self.named_parameters():
            parameter.sequence_parallel = self.config.sequence_parallel  # Megatron sums such gradients over the ranks
            if self.config.perform_initialization and "norm" not in name:
                torch.nn.init.zeros_(parameter) if name.endswith("bias") else self.config.init_method(parameter)

    def embed(self, codes_FQ: Tensor, first_FH: Tensor) -> Tensor:
        """Embeddings of frames as they enter the Talker: the sum over their codebooks.

        Args:
            codes_FQ: codes, int64, of which codebook 0 is not read; a code of −1 adds nothing.
            first_FH: what the residual codes' embeddings are added to, that of codebook 0 by the Talker's own.

        Returns:
            (F, H).
        """
        residual_FG = codes_FQ[:, 1:]
        return first_FH + F.embedding_bag(
            self._rows(residual_FG),
            self.embeddings.flatten(0, 1),
            mode="sum",
            per_sample_weights=(residual_FG >= 0).to(self.embeddings.dtype),
        )

    def _rows(self, codes: Tensor) -> Tensor:
        """Rows of residual codes (F, g) in the table of all embeddings (G · K, H)."""
        first_g = torch.arange(codes.shape[1], device=codes.device) * self.codebook_size
        return codes.clamp(min=0) + first_g


class CodePredictor(ResidualEmbedding):
    """Code predictor. Each tensor-parallel rank holds all of it and runs it on its own frames.

    Residual code i has embedding i − 1 and head i − 1. The embeddings have the Talker's width, which adds them to its
    own input; where the predictor is narrower, one projection takes them, e0 and the hidden state to its width.

    Args:
        talker: sizes.
        config: Megatron's configuration of the Talker.
    """

    def __init__(self, talker: TalkerConfig, config) -> None:
        super().__init__(talker, config)
        sizes, where = talker.code_predictor, {"dtype": config.params_dtype, "device": platform.device()}
        heads = (self.num_residuals, self.codebook_size, sizes.hidden_size)
        self.heads = torch.nn.Parameter(torch.empty(heads, **where))
        self.input_projection: torch.nn.Module = torch.nn.Identity()
        if talker.hidden_size != sizes.hidden_size:
            self.input_projection = torch.nn.Linear(talker.hidden_size, sizes.hidden_size, **where)
        self.layers = torch.nn.ModuleList(Layer(sizes, config) for _ in range(sizes.num_hidden_layers))
        self.norm = backend().plain_norm(config, sizes.hidden_size, sizes.rms_norm_eps)
        self.rotary = TMRotaryEmbedding(sizes.head_dim, sizes.rope_theta, (sizes.head_dim // 2, 0, 0))
        self._initialize()

    def hidden(self, h_FH: Tensor, first_FH: Tensor, codes_FG: Tensor) -> Tensor:
        """States that predict the residual codes, by one causal pass over [h, e0(c0), e1(c1), …].

        With no frames the pass is still made, on one whose states are dropped, so that every parameter has a gradient.

        Args:
            h_FH: the Talker's last hidden state, after its norm, at the position that predicted the frame's codebook 0.
            first_FH: the Talker's embedding of codebook 0.
            codes_FG: residual codes, int64; the last is not read, and what is negative reads as code 0.

        Returns:
            (F, G, P): state g predicts residual code g, from codebook 0 and the residual codes before g.
        """
        inputs = F.embedding(self._rows(codes_FG[:, :-1]), self.embeddings.flatten(0, 1))
        inputs_FQH = torch.cat([h_FH[:, None], first_FH[:, None], inputs], dim=1)
        frames = len(inputs_FQH)
        if not frames:
            inputs_FQH = F.pad(inputs_FQH, (0, 0, 0, 0, 0, 1))
        parts = [self._run(part, self._angles(part.device)) for part in inputs_FQH.split(FRAMES_AT_ONCE)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:frames, 1:]

    def losses(self, h_FH: Tensor, first_FH: Tensor, labels_FG: Tensor, *, chunk_tokens: int) -> Tensor:
        """Cross-entropy of every residual code, given the codes before it.

        Args:
            h_FH: see :meth:`hidden`.
            first_FH: see :meth:`hidden`.
            labels_FG: residual codes, int64, IGNORE in all of a frame that has none.
            chunk_tokens: codes whose logits exist at once, at least one frame's.

        Returns:
            (F, G) float32 in nats, 0 where ignored.
        """
        hidden_FGP = self.hidden(h_FH, first_FH, labels_FG)
        frames = max(1, chunk_tokens // self.num_residuals)
        pairs = zip(hidden_FGP.split(frames), labels_FG.split(frames), strict=True)
        return torch.cat([checkpoint(_cross_entropy, hidden, self.heads, labels) for hidden, labels in pairs])

    @torch.no_grad()
    def generate(self, h_FH: Tensor, first_FH: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Residual codes of frames, one codebook after the other.

        Args:
            h_FH: see :meth:`hidden`.
            first_FH: see :meth:`hidden`.
            choose: (logits (F, K), index of the residual codebook) -> codes (F,), greedy or drawn.

        Returns:
            (F, G) int64.
        """
        cache: Cache = []
        angles = self._angles(h_FH.device)
        inputs, codes = torch.stack([h_FH, first_FH], dim=1), []
        for index, (embedding_KH, head_KP) in enumerate(zip(self.embeddings, self.heads, strict=True)):
            start = index + 1 if index else 0
            hidden = self._run(inputs, angles[start : index + 2], cache)
            codes.append(choose(F.linear(hidden[:, -1], head_KP), index))
            inputs = F.embedding(codes[-1], embedding_KH)[:, None]
        return torch.stack(codes, dim=1)

    def _run(self, inputs: Tensor, angles: Tensor, cache: Cache | None = None) -> Tensor:
        x, recompute = self.input_projection(inputs), self.config.recompute_granularity == "full"
        for index, layer in enumerate(self.layers):
            if cache is None:
                x = checkpoint(layer, x, angles) if recompute and torch.is_grad_enabled() else layer(x, angles)
            else:
                x = layer(x, angles, cache, index)
        return self.norm(x)

    def _angles(self, device: torch.device) -> Tensor:
        """Rotary cosines and sines of the positions, (Q, 1, D)."""
        return self.rotary(torch.arange(self.num_residuals + 1, device=device).expand(3, -1))


def _cross_entropy(hidden_FGP: Tensor, heads_GKP: Tensor, labels_FG: Tensor) -> Tensor:
    logits_GFK = torch.bmm(hidden_FGP.transpose(0, 1), heads_GKP.transpose(1, 2)).float()
    losses = F.cross_entropy(logits_GFK.flatten(0, 1), labels_FG.T.flatten(), reduction="none", ignore_index=IGNORE)
    return losses.view_as(labels_FG.T).T


class Layer(torch.nn.Module):
    """Transformer layer as Qwen3's: pre-norm, grouped queries with normed queries and keys, SwiGLU, no biases.

    Args:
        sizes: sizes.
        config: Megatron's configuration of the Talker.
    """

    def __init__(self, sizes: CodePredictorConfig, config) -> None:
        super().__init__()
        where = {"bias": False, "dtype": config.params_dtype, "device": platform.device()}
        heads, groups, width = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim

        def norm(size: int) -> torch.nn.Module:
            return backend().plain_norm(config, size, sizes.rms_norm_eps)

        self.split, self.head_dim = (heads, groups, groups), width
        self.input_norm, self.mlp_norm = norm(sizes.hidden_size), norm(sizes.hidden_size)
        self.query_norm, self.key_norm = norm(width), norm(width)
        self.qkv = torch.nn.Linear(sizes.hidden_size, sum(self.split) * width, **where)  # all of q, all of k, all of v
        self.output = torch.nn.Linear(heads * width, sizes.hidden_size, **where)
        self.gate_up = torch.nn.Linear(sizes.hidden_size, 2 * sizes.intermediate_size, **where)
        self.down = torch.nn.Linear(sizes.intermediate_size, sizes.hidden_size, **where)
        self.qkv.weight.fused_rows = tuple(part * width for part in self.split)
        self.gate_up.weight.fused_rows = (sizes.intermediate_size,) * 2

    def forward(self, x: Tensor, angles: Tensor, cache: Cache | None = None, index: int = 0) -> Tensor:
        """Output of the layer, (F, n, P) -> (F, n, P).

        Args:
            x: states of n codebooks; with a cache that is not empty of one, after those in the cache.
            angles: (n, 1, D) rotary cosines and sines.
            cache: keys and values so far, which this layer's are added to.
            index: of the layer in the cache.
        """
        x = x + self._attend(self.input_norm(x), angles, cache, index)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)

    def _attend(self, x: Tensor, angles: Tensor, cache: Cache | None, index: int) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.split, dim=2)
        query = apply_rotary(self.query_norm(query), angles).transpose(1, 2)
        key, value = apply_rotary(self.key_norm(key), angles).transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            if index < len(cache):
                key, value = (torch.cat(pair, dim=2) for pair in zip(cache[index], (key, value), strict=True))
            cache[index : index + 1] = [(key, value)]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, enable_gqa=True)
        return self.output(out.transpose(1, 2).flatten(2))
