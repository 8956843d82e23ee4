"""The attention layer is transformers' Qwen3.5 attention on each sequence alone, in every layout."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeAttention,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeTextRotaryEmbedding,
)

from omni_train.nn.context_parallel import context_slice_indices
from omni_train.recipe.schema import ParallelConfig
from tests.support.pool import RankFailed

HIDDEN, HEAD_DIM, ROTARY_DIM, SECTIONS, THETA, EPS = 48, 24, 12, [2, 2, 2], 1e4, 1e-5
CU_SEQLENS = torch.tensor([0, 24, 72, 80, 120], dtype=torch.int32)  # multiples of 8, for context parallelism of 4
TOKENS = 120


class Reference(torch.nn.Module):
    """x + attention(norm(x)) by transformers, one sequence at a time."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        config = Qwen3_5MoeTextConfig(
            hidden_size=HIDDEN,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=HEAD_DIM,
            rms_norm_eps=EPS,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": THETA,
                "partial_rotary_factor": ROTARY_DIM / HEAD_DIM,
                "mrope_section": SECTIONS,
            },
            attn_implementation="sdpa",
        )
        self.heads, self.kv_heads = heads, kv_heads
        self.norm = Qwen3_5MoeRMSNorm(HIDDEN, eps=EPS)
        self.attention = Qwen3_5MoeAttention(config, layer_idx=0)
        self.rotary = Qwen3_5MoeTextRotaryEmbedding(config)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, x, position_ids):
        outs = []
        for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
            part = x[None, start:end]
            angles = self.rotary(part, position_ids[:, None, start:end])
            outs.append(part + self.attention(self.norm(part), angles, attention_mask=None)[0])
        return torch.cat(outs, dim=1)[0]

    def as_megatron(self, of) -> dict[str, torch.Tensor]:
        """`of(parameter)`, its value or its gradient, under Megatron's names and in Megatron's order."""
        attention, group = self.attention, self.heads // self.kv_heads
        # Per head query and gate -> per key/value head: its queries, their gates, its key, its value.
        query, gate = of(attention.q_proj.weight).view(self.kv_heads, group, 2, HEAD_DIM, HIDDEN).unbind(2)
        key, value = (
            of(x.weight).view(self.kv_heads, 1, HEAD_DIM, HIDDEN) for x in (attention.k_proj, attention.v_proj)
        )
        return {
            "input_layernorm.weight": of(self.norm.weight),
            "self_attention.linear_qkv.weight": torch.cat([query, gate, key, value], dim=1).reshape(-1, HIDDEN),
            "self_attention.q_layernorm.weight": of(attention.q_norm.weight),
            "self_attention.k_layernorm.weight": of(attention.k_norm.weight),
            "self_attention.linear_proj.weight": of(attention.o_proj.weight),
        }


def shard(name, tensor, rank, size):
    """A tensor-parallel rank's part of a parameter."""
    axis = {"linear_qkv": 0, "linear_proj": 1}.get(name.split(".")[1])
    return tensor if axis is None else tensor.chunk(size, dim=axis)[rank]


def attention_layer(parallel, heads, kv_heads, **options):
    """A Megatron layer; process groups exist already."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from omni_train.nn.attention import PackedAttention
    from omni_train.nn.layers import attention_layer_spec
    from omni_train.nn.norm import ZeroCentredRMSNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=HEAD_DIM,
        attention_output_gate=True,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=EPS,
        add_bias_linear=False,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1,
        context_parallel_size=parallel.context,
        **{"attention_dropout": 0.0, **options},
    )
    spec = attention_layer_spec(
        norm=ZeroCentredRMSNorm,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        core_attention=PackedAttention,
    )
    return build_module(
        spec, config=config, layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )


def attend(rank, world_size, parallel, reference_shape, weights, x, position_ids, grad, options):
    """Positions of this rank's tokens in the row, output and input gradient there, and gradients of its parameters."""
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
    from megatron.core.packed_seq_params import PackedSeqParams

    from omni_train import platform
    from omni_train.nn.rotary import TMRotaryEmbedding

    platform.parallel.initialize(parallel, seed=5)
    tensor = parallel_state.get_tensor_model_parallel_rank()
    layer = attention_layer(parallel, *reference_shape, **options)
    layer.load_state_dict(
        {name: shard(name, value, tensor, parallel.tensor) for name, value in weights.items()}, strict=False
    )

    mine = context_slice_indices(CU_SEQLENS, parallel_state.get_context_parallel_rank(), parallel.context)
    rotary = TMRotaryEmbedding(ROTARY_DIM, THETA, SECTIONS)(position_ids[:, mine])
    mine = mine.chunk(parallel.tensor)[tensor]
    part = x[mine].unsqueeze(1).requires_grad_()
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=CU_SEQLENS, cu_seqlens_kv=CU_SEQLENS)
    out, _ = layer(part, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed)
    out.backward(grad[mine].unsqueeze(1))

    # As at the end of a step: Megatron's own sum over tensor ranks, and data parallelism's over context ranks.
    layer.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    _allreduce_non_tensor_model_parallel_grads([layer], layer.config, parallel_state.get_tensor_model_parallel_group())
    for parameter in layer.parameters():
        torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_context_parallel_group())
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return mine, out[:, 0].detach(), part.grad[:, 0], tensor, grads


def check(distributed, heads, kv_heads, parallel, **options):
    torch.manual_seed(61)
    reference = Reference(heads, kv_heads)
    x, grad = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(TOKENS, HIDDEN)
    position_ids = torch.randint(0, 300, (3, TOKENS))
    expected = reference(x, position_ids)
    expected.backward(grad)
    expected_grads = reference.as_megatron(lambda parameter: parameter.grad)
    weights = reference.as_megatron(lambda parameter: parameter.detach())

    results = distributed(
        parallel.tensor * parallel.context,
        attend,
        parallel,
        (heads, kv_heads),
        weights,
        x.detach(),
        position_ids,
        grad,
        options,
    )
    assert torch.cat([mine for mine, *_ in results]).sort().values.tolist() == list(range(TOKENS))
    for mine, out, grad_x, tensor, grads in results:
        torch.testing.assert_close(out, expected[mine], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_x, x.grad[mine], rtol=1e-4, atol=1e-4)
        assert grads.keys() == expected_grads.keys()
        for name, value in expected_grads.items():
            value = shard(name, value, tensor, parallel.tensor)
            torch.testing.assert_close(
                grads[name], value, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: name + text
            )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (6, 3), (3, 3)])
def test_a_packed_row_equals_transformers_on_each_sequence_with_gradients(distributed, heads, kv_heads):
    check(distributed, heads, kv_heads, ParallelConfig())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (6, 3)])
def test_context_parallelism_of_two_changes_nothing(distributed, heads, kv_heads):
    check(distributed, heads, kv_heads, ParallelConfig(context=2))


def test_context_parallelism_of_four_changes_nothing(distributed):
    check(distributed, 6, 3, ParallelConfig(context=4))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("context", [1, 2])
def test_tensor_parallelism_changes_nothing_even_with_fewer_key_value_heads(distributed, kv_heads, context):
    check(distributed, 4, kv_heads, ParallelConfig(tensor=2, context=context))


def test_recomputing_the_core_changes_nothing(distributed):
    options = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    check(distributed, 6, 2, ParallelConfig(context=2), **options)


def build(rank, world_size, options):
    from omni_train import platform

    platform.parallel.initialize(ParallelConfig(), seed=5)
    attention_layer(ParallelConfig(), 4, 2, **options)


@pytest.mark.parametrize("options", [{"attention_dropout": 0.1}, {"window_size": (4, 0)}])
def test_what_the_kernel_has_not_is_refused_by_name(distributed, options):
    with pytest.raises(RankFailed, match=f"UserError: {next(iter(options))}"):
        distributed(1, build, options)


def with_inference_context(rank, world_size):
    from omni_train import platform

    platform.parallel.initialize(ParallelConfig(), seed=5)
    attention_layer(ParallelConfig(), 4, 2).self_attention(torch.zeros(8, 1, HIDDEN), None, inference_context=object())


def test_an_inference_context_is_refused_by_name(distributed):
    with pytest.raises(RankFailed, match=r"NotImplementedError: .*inference_context"):
        distributed(1, with_inference_context)
