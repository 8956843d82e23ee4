"""Multi-token prediction: one more layer that predicts the token after the next (Qwen3.5, DeepSeek-V3 section 2.2)."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.module import MegatronModule

from omni_train.models.row import LocalRow
from omni_train.nn import balance
from omni_train.nn.backend import backend


class MultiTokenPrediction(MegatronModule):
    """Multi-token-prediction layer: fc([norm(embedding of the next token), norm(hidden state)]) → a block → norm.

    The next token may be one of audio or vision: vLLM's drafter reads their features one position ahead, too. Shares
    the embedding and the head with the model. The block is an attention layer and a feed-forward of the model's own
    kinds.

    Args:
        config: Megatron's configuration of the Thinker.
        submodules: the layers of its hybrid stack.
        groups: process groups.
    """

    layers = ()  # Megatron's schedules look here for layers to capture in CUDA graphs

    def __init__(self, config, submodules: HybridStackSubmodules, groups) -> None:
        super().__init__(config)

        def norm():
            return backend().norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        self.embedding_norm, self.hidden_norm, self.final_norm = norm(), norm(), norm()
        self.projection = tensor_parallel.ColumnParallelLinear(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=groups.tp,
        )
        self.tp_group = groups.tp
        self.decoder = HybridStack(
            config,
            submodules,
            layer_type_list=list("*E" if config.num_moe_experts else "*-"),
            post_layer_norm=False,
            pg_collection=groups,
            is_mtp_layer=True,
        )
        for router in balance.routers(self.decoder):
            router.is_mtp_layer = True  # which the stack tells its attention layers only

    def forward(self, next_embedding: torch.Tensor, hidden: torch.Tensor, rotary: torch.Tensor, row: LocalRow):
        """Hidden states that predict ``row.next_labels``.

        Args:
            next_embedding: (S, 1, H) input embedding of the token after each, audio and vision included.
            hidden: (S, 1, H) the model's final hidden states.
            rotary: (T, 1, R) cosines and sines, from :class:`omni_train.nn.rotary.TMRotaryEmbedding`.
            row: the row.

        Returns:
            (S, 1, H) hidden states after this layer's final norm.
        """
        joined = torch.cat([self.embedding_norm(next_embedding), self.hidden_norm(hidden)], dim=-1)
        projected, _ = self.projection(joined)  # (T, 1, H/tp): the projection is column parallel
        if self.config.sequence_parallel:
            projected = tensor_parallel.gather_from_tensor_model_parallel_region(projected, group=self.tp_group)
            projected = tensor_parallel.scatter_to_sequence_parallel_region(projected, group=self.tp_group)
        out = self.decoder(
            hidden_states=projected,
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=row.packed,
            padding_mask=row.padding[None],
        )
        return self.final_norm(out)
