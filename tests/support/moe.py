"""A small mixture of experts in any layout, filled with the slices of one set of whole weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from omni_train import platform
from omni_train.recipe.schema import ParallelConfig

HIDDEN, EXPERTS, TOP_K, WIDTH, SHARED_WIDTH = 20, 6, 2, 24, 28


def config(parallel: ParallelConfig, **options):
    """Megatron's configuration of the layer, for process groups that exist."""
    from megatron.core.transformer import TransformerConfig

    defaults = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        ffn_hidden_size=WIDTH,
        num_attention_heads=2,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOP_K,
        moe_ffn_hidden_size=WIDTH,
        moe_shared_expert_intermediate_size=SHARED_WIDTH,
        moe_shared_expert_gate=True,
        moe_token_dispatcher_type="alltoall",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        init_method_std=0.3,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        calculate_per_token_loss=True,
    )
    return TransformerConfig(**(defaults | options))


def groups(parallel: ParallelConfig, seed: int = 5):
    """Process groups of the layout."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    platform.parallel.initialize(parallel, seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def build_layer(parallel: ParallelConfig, **options):
    """The whole layer as the hybrid stack builds it, norm and residual included, and its process groups."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import build_module

    from omni_train.nn.moe import moe_spec
    from omni_train.nn.norm import ZeroCentredRMSNorm

    pg = groups(parallel)
    spec = moe_spec(norm=ZeroCentredRMSNorm, column_linear=ColumnParallelLinear, row_linear=RowParallelLinear)
    return build_module(spec, config=config(parallel, **options), layer_number=1, pg_collection=pg), pg


def whole_weights(seed: int = 11) -> dict[str, torch.Tensor]:
    """Weights of the layer's mixture over all experts and ranks, by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "router.weight": (EXPERTS, HIDDEN),
        "experts.linear_fc1.weight": (EXPERTS, 2 * WIDTH, HIDDEN),
        "experts.linear_fc2.weight": (EXPERTS, HIDDEN, WIDTH),
        "shared_experts.linear_fc1.weight": (2 * SHARED_WIDTH, HIDDEN),
        "shared_experts.linear_fc2.weight": (HIDDEN, SHARED_WIDTH),
        "shared_experts.gate_weight": (1, HIDDEN),
    }
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def local_slice(name: str, whole: torch.Tensor, pg) -> torch.Tensor:
    """This rank's part of a whole weight."""
    if name.startswith("experts."):
        whole, group = whole.chunk(pg.ep.size())[pg.ep.rank()], pg.expt_tp
    elif name.startswith("shared_experts.linear"):
        group = pg.tp
    else:
        return whole
    if name.endswith("linear_fc2.weight"):
        return whole.chunk(group.size(), dim=-1)[group.rank()]
    halves = whole.chunk(2, dim=-2)
    return torch.cat([half.chunk(group.size(), dim=-2)[group.rank()] for half in halves], dim=-2)


@torch.no_grad()
def fill(module: torch.nn.Module, whole: dict[str, torch.Tensor], pg) -> None:
    """Load this rank's slices into a mixture of experts."""
    for name, parameter in module.named_parameters():
        parameter.copy_(local_slice(name, whole[name], pg))
