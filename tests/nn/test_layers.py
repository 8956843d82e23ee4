"""The stack's layers start as Qwen3.5's do, and the dense one computes what Qwen3.5's does."""

import torch
import torch.nn.functional as F

from omni_train.recipe.schema import ParallelConfig
from tests.support.thinker import small_recipe


def stack(pattern):
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.process_groups_config import ProcessGroupCollection

    from omni_train import platform
    from omni_train.models.thinker.config import transformer_config
    from omni_train.nn.backend import backend
    from omni_train.nn.layers import stack_submodules

    platform.parallel.initialize(ParallelConfig(), seed=3)
    recipe = small_recipe(pattern=pattern, repeats=1, linear_num_value_heads=64, intermediate_size=72)
    return HybridStack(
        transformer_config(recipe),
        stack_submodules(backend()),
        layer_type_list=list(pattern),
        post_layer_norm=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def starting_values(rank, world_size):
    return {name: parameter.detach() for name, parameter in stack("G*E-").named_parameters()}


def test_norms_start_as_the_identity_and_decays_over_the_whole_range(distributed):
    (values,) = distributed(1, starting_values)
    norms = {name: value for name, value in values.items() if "norm" in name}
    assert len(norms) == 7
    for name, value in norms.items():
        assert (value == (1 if name.endswith("out_norm.weight") else 0)).all(), name
    (decay,) = (value.exp() for name, value in values.items() if name.endswith("A_log"))
    assert len(decay) == 64
    assert 0.01 <= decay.min() < 1 < 15 < decay.max() <= 16


def dense(rank, world_size, x):
    decoder = stack("-")
    out = decoder(x, attention_mask=None)
    return out.detach(), {name: parameter.detach() for name, parameter in decoder.named_parameters()}


def test_the_dense_layer_is_a_gated_silu_mlp_on_the_normalised_input(distributed):
    x = torch.randn(11, 1, 48, generator=torch.Generator().manual_seed(71))
    ((out, weights),) = distributed(1, dense, x)
    gate, up = weights["layers.0.mlp.linear_fc1.weight"].chunk(2)
    normed = F.rms_norm(x, (48,), eps=1e-6)
    expected = x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ weights["layers.0.mlp.linear_fc2.weight"].T
    torch.testing.assert_close(out, expected)
