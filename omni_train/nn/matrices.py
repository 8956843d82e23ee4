"""Which parameters of a model are matrices, and which of them hold several matrices above one another.

One product may compute several maps: the query, key and value of attention, the gate and up projections of SwiGLU, all
that Gated DeltaNet makes of its input. An optimizer that treats a matrix as a whole must know them apart.
"""

from __future__ import annotations

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP

from omni_train.nn.experts import GroupedExperts, StackedLinear

FusedRows = tuple[int, ...]
"""Rows of each map of a parameter, (…, rows, columns). Where all of them together are fewer than the parameter's rows,
over all tensor ranks in order, they repeat."""


def matrices(model: torch.nn.Module) -> dict[torch.nn.Parameter, FusedRows]:
    """The linear maps of a model, stacked ones (E, rows, columns) included: all that has two sides.

    Not embeddings, the output head and position tables, whose rows are looked up or scored one by one; not convolutions
    and norms; not a gate's single row.
    """
    fused, found = _fused(model), {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            single_row = parameter.dim() == 2 and min(parameter.shape) == 1
            looked_up = isinstance(module, torch.nn.Embedding) or getattr(
                parameter, "is_embedding_or_output_parameter", False
            )
            if isinstance(module, StackedLinear) or (parameter.dim() == 2 and not single_row and not looked_up):
                found[parameter] = fused.get(parameter, (parameter.shape[-2],))
    return found


def _fused(model: torch.nn.Module) -> dict[torch.nn.Parameter, FusedRows]:
    fused = {}
    for module in model.modules():
        if isinstance(module, Attention) and hasattr(module, "linear_qkv"):
            config = module.config
            queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
            gates = (queries,) if config.attention_output_gate else ()
            fused[module.linear_qkv.weight] = (queries, *gates, config.kv_channels, config.kv_channels)
        elif isinstance(module, GatedDeltaNet):
            fused[module.in_proj.weight] = tuple(module.in_proj_split_sections)
        elif isinstance(module, GroupedExperts) or (isinstance(module, MLP) and module.config.gated_linear_unit):
            half = module.linear_fc1.weight.shape[-2] // 2
            fused[module.linear_fc1.weight] = (half, half)
    return fused
