"""What enters the Talker: text and the Thinker's states by projections, frames by embeddings of codes; and its head.

All of it is replicated over the tensor-parallel ranks, but the table of text; each rank embeds its own positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from omni_train import platform


def replicate(module: torch.nn.Module, config) -> None:
    """Mark the parameters of a module that every tensor-parallel rank holds whole and runs on positions of its own:
    Megatron sums their gradients over the ranks.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ResizeMLP(torch.nn.Module):
    """Projection to the Talker's width: linear, SiLU, linear, with biases (Qwen3-Omni's ``TalkerResizeMLP``).

    Args:
        width: width of what is projected.
        intermediate: width inside.
        hidden: width of the Talker.
        config: Megatron's configuration of the Talker.
    """

    def __init__(self, width: int, intermediate: int, hidden: int, config) -> None:
        super().__init__()
        where = {"dtype": config.params_dtype, "device": platform.device()}
        self.linear_fc1 = torch.nn.Linear(width, intermediate, **where)
        self.linear_fc2 = torch.nn.Linear(intermediate, hidden, **where)
        for linear in (self.linear_fc1, self.linear_fc2):
            config.init_method(linear.weight)
            torch.nn.init.zeros_(linear.bias)
        replicate(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Project (…, width) -> (…, hidden)."""
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class TextTable(MegatronModule):
    """Table of text embeddings of the Thinker's width, split over the vocabulary by tensor parallelism.

    Args:
        vocab_size: tokens.
        width: width of an embedding.
        config: Megatron's configuration of the Talker.
        tp_group: the tensor-parallel ranks.
    """

    def __init__(self, vocab_size: int, width: int, config, tp_group) -> None:
        super().__init__(config)
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            width,
            init_method=config.embedding_init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
            tp_group=tp_group,
        )

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Embeddings of this rank's positions, (T,) ids -> (S, width); negative ids give that of token 0."""
        embedded = self.word_embeddings(tokens_T.clamp(min=0)[None])
        return embedded[:, 0] if self.config.sequence_parallel else embedded[0]


class CodecEmbedding(torch.nn.Module):
    """Embeddings of codebook 0 and of the control codes.

    Args:
        vocab_size: codes.
        hidden: width of the Talker.
        config: Megatron's configuration of the Talker.
    """

    def __init__(self, vocab_size: int, hidden: int, config) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(vocab_size, hidden, dtype=config.params_dtype, device=platform.device())
        )
        config.init_method(self.weight)
        replicate(self, config)

    def forward(self, codes: Tensor) -> Tensor:
        """Embeddings of codes, (…,) -> (…, hidden)."""
        return F.embedding(codes, self.weight)


class CodecHead(CodecEmbedding):
    """Head over codebook 0 and the control codes: a row of its weight for each."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, (…, hidden) -> (…, vocabulary)."""
        return F.linear(hidden, self.weight)


def add_at(hidden_SH: Tensor, here: Tensor, features: Tensor) -> Tensor:
    """Hidden states with features (n, H) added at the positions `here` (n,); with none still part of their graph."""
    return hidden_SH.index_put((here,), features.to(hidden_SH.dtype), accumulate=True)
