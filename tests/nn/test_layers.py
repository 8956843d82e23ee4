"""The stack's layers start as Qwen3.5's do, and the dense one computes what Qwen3.5's does."""

import torch
import torch.nn.functional as F

from omni_train.recipe.schema import ParallelConfig, Precision
from tests.support.thinker import small_recipe


def stack(pattern, **changes):
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.process_groups_config import ProcessGroupCollection

    from omni_train import platform
    from omni_train.models.config import stack_config
    from omni_train.nn.backend import backend
    from omni_train.nn.layers import stack_submodules

    platform.parallel.initialize(ParallelConfig(), seed=3)
    recipe = small_recipe(pattern=pattern, repeats=1, linear_num_value_heads=64, intermediate_size=72, **changes)
    return HybridStack(
        stack_config(recipe, recipe.model.thinker),
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


def decays_in_bf16(rank, world_size, alpha):
    """fp32 parameters of a bf16 stack, and the logarithm of the decay: what the kernel is given, and what is right."""
    from megatron.core.packed_seq_params import PackedSeqParams

    decoder = stack("G", precision=Precision.bf16)
    layer, given = decoder.layers[0].self_attention, []
    with torch.no_grad():
        layer.in_proj.weight.zero_()
        layer.dt_bias.copy_(alpha)
    kernel = layer.gated_delta_rule
    layer.gated_delta_rule = lambda *args, g, **options: given.append(g) or kernel(*args, g=g, **options)
    boundaries = torch.tensor([0, 3], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    layer(torch.ones(3, 1, 48, dtype=torch.bfloat16), None, packed_seq_params=packed)
    fp32 = {name for name, parameter in decoder.named_parameters() if parameter.dtype is torch.float32}
    expected = -layer.A_log.double().exp() * F.softplus(layer.dt_bias.double())
    return fp32, given[0], expected.detach()


def test_a_bf16_model_decays_by_fp32_numbers(distributed):
    """As transformers' `-self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)` with A_log in fp32."""
    ((fp32, given, expected),) = distributed(1, decays_in_bf16, torch.linspace(-3.0, 3.0, 64))
    assert fp32 == {"layers.0.self_attention.A_log", "layers.0.self_attention.out_norm.weight"}
    assert given.dtype is torch.float32
    torch.testing.assert_close(given[0], expected.float().expand(3, 64), rtol=1e-6, atol=0)


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
