"""Mixture-of-experts layer of the hybrid stack: router, dispatch, stacked experts, gated shared expert.

Axis letters: T tokens of this rank, K experts chosen per token, E experts, R = T·K routed rows, H hidden.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from omni_train.nn.balance import BalancedRouter
from omni_train.nn.experts import GroupedExperts


def moe_spec(*, norm, column_linear, row_linear) -> ModuleSpec:
    """Spec of the hybrid stack's `moe_layer`: norm, mixture of experts, residual.

    Args:
        norm: class of the norm before it.
        column_linear, row_linear: tensor-parallel linear classes of the shared expert, split on output and on input.

    The configuration decides the rest: `moe_shared_expert_intermediate_size` (None for no shared expert),
    `moe_shared_expert_gate`, `moe_router_topk`, `moe_ffn_hidden_size`.
    """
    shared_experts = partial(SharedExpertMLP, submodules=MLPSubmodules(column_linear, row_linear))
    submodules = MoESubmodules(experts=GroupedExperts, shared_experts=shared_experts, router=BalancedRouter)
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=partial(MixtureOfExperts, submodules=submodules),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class MixtureOfExperts(MoELayer):
    """Megatron's mixture-of-experts layer with :class:`RowDispatcher`."""

    def __init__(self, config, *args, pg_collection, **kwargs) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = RowDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )


class RowDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all token dispatcher with fewer copies, and the same results.

    Sources and destinations of all rows are known, so rows are gathered in both directions and both passes, never
    scattered and added; and rows already sorted by expert are not split and joined again when this rank exchanges none.

    The experts take their counts on the device. The host waits for numbers only where ranks exchange rows, whose
    collectives must know how many: before the exchange of tokens, for a copy that began before the rows were sorted.

    Raises:
        ValueError: options of the stock dispatcher that drop, pad or overlap are set.
    """

    def __init__(self, *args, config, pg_collection) -> None:
        super().__init__(*args, config=config, pg_collection=pg_collection)
        refused = ("moe_permute_fusion", "moe_shared_expert_overlap", "moe_expert_capacity_factor")
        for option in (*refused, "moe_router_padding_for_quantization"):
            if getattr(config, option):
                raise ValueError(f"{option} must be unset with RowDispatcher")
        self.alone = self.tp_size == self.ep_size == 1

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Permute tokens to rows sorted by expert.

        Args:
            hidden_states: (…, H) T tokens.
            routing_map: (T, E) bool.
            probs: (T, E) routing probabilities.

        Returns:
            (R, H) rows and (R,) their probabilities.
        """
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        if self.alone:
            self.tokens_per_expert = routing_map.sum(0)
        else:
            self.tokens_per_expert = self.preprocess(routing_map)
            self._maybe_dtoh_and_synchronize("before_permutation_1")  # what is not given to it stays on the device
        rows = routing_map.shape[0] * self.config.moe_router_topk
        chosen_R = routing_map.T.flatten().argsort(descending=True, stable=True)[:rows]
        self.source_R = chosen_R % routing_map.shape[0]
        self.rows_TK = self.source_R.argsort(stable=True).view(routing_map.shape[0], -1)
        rows_RH = _Spread.apply(hidden_states.reshape(-1, self.hidden_shape[-1]), self.source_R, self.rows_TK)
        return rows_RH, probs.T.flatten()[chosen_R]

    def dispatch_postprocess(self, rows: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sort rows received from other ranks by local expert; rows, rows per expert, and probabilities."""
        return (rows, self.tokens_per_expert, probs) if self.alone else super().dispatch_postprocess(rows, probs)

    def combine_preprocess(self, rows: Tensor) -> Tensor:
        """Restore the order in which the rows were received, (R, H) -> (R, H)."""
        return rows if self.alone else super().combine_preprocess(rows)

    def combine_postprocess(self, rows: Tensor) -> Tensor:
        """Sum the experts' outputs of each token, (R, H) -> the shape of the tokens."""
        # Else its graph would hold this layer's activations until the next call, and keep the model alive.
        self.probs = None
        return _Gather.apply(rows, self.source_R, self.rows_TK).view(self.hidden_shape)


class _Spread(torch.autograd.Function):
    """tokens (T, H) -> rows (R, H), each token's copy for each of its experts."""

    @staticmethod
    def forward(ctx, tokens, source_R, rows_TK):
        ctx.save_for_backward(rows_TK)
        return tokens.index_select(0, source_R)

    @staticmethod
    def backward(ctx, grad_rows):
        # An embedding bag reads K rows and sums them in one pass, in a fixed order.
        return F.embedding_bag(ctx.saved_tensors[0], grad_rows, mode="sum"), None, None


class _Gather(torch.autograd.Function):
    """rows (R, H) -> tokens (T, H), each the sum of its rows: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx, rows, source_R, rows_TK):
        ctx.save_for_backward(source_R)
        return F.embedding_bag(rows_TK, rows, mode="sum")

    @staticmethod
    def backward(ctx, grad_tokens):
        return grad_tokens.index_select(0, ctx.saved_tensors[0]), None, None
