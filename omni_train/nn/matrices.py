"""Matrix parameters of a model, and which of them are several matrices fused.

One product may compute several linear maps: query, key and value of attention, gate and up projections of SwiGLU, all
projections of Gated DeltaNet. An optimizer that treats a matrix as a whole, such as Muon, must tell them apart.
"""

from __future__ import annotations

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP

from omni_train.nn.experts import GroupedExperts, StackedLinear

FusedRows = tuple[int, ...]
"""Rows of each linear map fused in a parameter (…, rows, columns). Where they sum to fewer rows than the parameter has
over all tensor-parallel ranks, the sequence of maps repeats."""


def matrices(model: torch.nn.Module) -> dict[torch.nn.Parameter, FusedRows]:
    """Matrix parameters of a model, stacked ones (E, rows, columns) included, with the maps fused in each.

    Embeddings, the output head and position tables are not among them, as their rows are looked up or scored one by
    one; nor are convolutions, norms and a gate's single row.
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
    fused = {p: p.fused_rows for p in model.parameters() if hasattr(p, "fused_rows")}  # of our own layers
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
