"""A parameter of which each tensor-parallel rank has a part is written as such, or the model is refused."""

from __future__ import annotations

import pytest
import torch

from omni_train.recipe.schema import ParallelConfig
from tests.support.pool import RankFailed


def check(rank, world_size, contained):
    """Ask about a column-parallel layer that is a child of the model, or of a list in it."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    from omni_train import platform
    from omni_train.checkpoint.sharded import check_sharding

    platform.parallel.initialize(ParallelConfig(tensor=world_size), 3)
    config = TransformerConfig(
        num_layers=1, hidden_size=6, num_attention_heads=2, tensor_model_parallel_size=world_size
    )
    model = MegatronModule(config)
    layer = ColumnParallelLinear(6, 10, config=config, init_method=config.init_method, bias=False)
    model.part = torch.nn.ModuleList([layer]) if contained else layer
    try:
        check_sharding([model])
    finally:
        platform.parallel.destroy()


def test_what_stands_in_a_plain_container_is_refused_by_name(distributed):
    with pytest.raises(RankFailed, match=r"part\.0\.weight: is split among tensor-parallel ranks"):
        distributed(2, check, True)


def test_what_is_written_in_parts_passes(distributed):
    distributed(2, check, False)
    distributed(1, check, True)
