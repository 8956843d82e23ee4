"""Stacked experts equal a loop over experts; their checkpoints fit every layout."""

import pytest
import torch
import torch.nn.functional as F

from omni_train.recipe.schema import ParallelConfig
from tests.support import moe


def loop_over_experts(tokens, counts, probs, fc1, fc2):
    """The definition: each expert's SwiGLU on its own rows, scaled by the router's probability."""
    outputs = []
    for expert, rows in enumerate(tokens.split(counts)):
        gate, up = F.linear(rows, fc1[expert]).chunk(2, dim=-1)
        scale = probs.split(counts)[expert][:, None]
        outputs.append(F.linear(F.silu(gate) * up * scale, fc2[expert]))
    return torch.cat(outputs)


def gradients(inputs, function):
    inputs = [value.clone().requires_grad_() for value in inputs]
    output = function(*inputs)
    (output.float() ** 2).sum().backward()
    return [output.detach(), *(value.grad for value in inputs)]


def grouped_against_loop(rank, world_size, counts, dtype, hidden_size=moe.HIDDEN, width=moe.WIDTH):
    from omni_train.nn.experts import GroupedExperts

    parallel = ParallelConfig()
    pg = moe.groups(parallel)
    options = dict(params_dtype=dtype, hidden_size=hidden_size, moe_ffn_hidden_size=width)
    experts = GroupedExperts(moe.EXPERTS, moe.config(parallel, **options), pg_collection=pg)
    torch.manual_seed(3)
    tokens, probs = torch.randn(sum(counts), hidden_size).to(dtype), torch.rand(sum(counts))
    inputs = [tokens, probs, experts.linear_fc1.weight.detach(), experts.linear_fc2.weight.detach()]

    def grouped(tokens, probs, fc1, fc2):
        weights = {"linear_fc1.weight": fc1, "linear_fc2.weight": fc2}
        output, bias = torch.func.functional_call(experts, weights, (tokens, torch.tensor(counts), probs))
        assert bias is None
        return output

    def reference(tokens, probs, fc1, fc2):
        return loop_over_experts(tokens, counts, probs, fc1, fc2)

    return gradients(inputs, grouped), gradients([value.double() for value in inputs], reference)


@pytest.mark.parametrize("counts", [[3, 1, 9, 4, 5, 2], [0, 7, 0, 0, 11, 0], [0, 0, 0, 0, 0, 0]])
def test_outputs_and_all_gradients_equal_a_loop_over_experts(distributed, counts):
    ((ours, reference),) = distributed(1, grouped_against_loop, counts, torch.float32)
    for mine, expected in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, expected.float(), rtol=1e-4, atol=1e-5)


def test_bf16_experts_stay_close_to_the_loop(distributed):
    ((ours, reference),) = distributed(1, grouped_against_loop, [30, 0, 9, 14, 25, 2], torch.bfloat16, 24, 40)
    assert [value.dtype for value in ours] == [torch.bfloat16] * 2 + [torch.float32] + [torch.bfloat16] * 2
    for mine, expected in zip(ours, reference, strict=True):
        assert (mine.double() - expected).norm() < 0.02 * expected.norm()


def sum_is_differentiable(rank, world_size):
    from omni_train.nn.experts import GroupedExperts

    parallel = ParallelConfig()
    experts = GroupedExperts(moe.EXPERTS, moe.config(parallel), pg_collection=moe.groups(parallel))
    tokens = torch.randn(9, moe.HIDDEN, requires_grad=True)
    experts(tokens, torch.tensor([2, 2, 2, 1, 1, 1]), torch.ones(9))[0].sum().backward()
    return bool(tokens.grad.abs().sum() > 0)


def test_a_gradient_that_is_not_contiguous_is_taken(distributed):
    assert distributed(1, sum_is_differentiable) == [True]


def initial_weights(rank, world_size, parallel, std):
    from omni_train.nn.experts import GroupedExperts

    pg = moe.groups(parallel)
    options = dict(hidden_size=64, moe_ffn_hidden_size=40, init_method_std=std)
    experts = GroupedExperts(
        moe.EXPERTS // parallel.expert, moe.config(parallel, num_layers=8, **options), pg_collection=pg
    )
    attributes = {(p.allreduce, p.tensor_model_parallel, p.partition_dim) for p in experts.parameters()}
    assert attributes == {(False, True, 1), (False, True, 2)}
    return [p.detach().clone() for p in experts.parameters()]


@pytest.mark.parametrize("parallel", [ParallelConfig(expert=2), ParallelConfig(tensor=2, expert_tensor=2)])
def test_initial_weights_differ_between_experts_and_ranks_with_the_configured_deviation(distributed, parallel):
    std = 0.05
    for layer, expected in enumerate((std, std / (2 * 8) ** 0.5)):  # Megatron scales output layers by depth
        parts = [weights[layer] for weights in distributed(2, initial_weights, parallel, std)]
        assert not torch.equal(*parts)
        experts = torch.cat(parts)
        assert len(experts.flatten(1).unique(dim=0)) == len(experts)
        torch.testing.assert_close(experts.std().item(), expected, rtol=0.05, atol=0)


def refused(rank, world_size):
    from omni_train.nn.experts import GroupedExperts

    parallel = ParallelConfig()
    pg = moe.groups(parallel)
    with pytest.raises(ValueError, match="must be SwiGLU without biases"):
        GroupedExperts(moe.EXPERTS, moe.config(parallel, activation_func=F.gelu), pg_collection=pg)
    with pytest.raises(ValueError, match="hidden size 20 and the experts' width per rank 20 must be multiples of 8"):
        GroupedExperts(
            moe.EXPERTS, moe.config(parallel, params_dtype=torch.bfloat16, moe_ffn_hidden_size=20), pg_collection=pg
        )


def test_other_activations_and_unaligned_widths_are_refused(distributed):
    distributed(1, refused)


def save(rank, world_size, parallel, directory):
    from megatron.core import dist_checkpointing

    layer, pg = moe.build_layer(parallel)
    moe.fill(layer.mlp, moe.whole_weights(), pg)
    dist_checkpointing.save(layer.sharded_state_dict(prefix="layer."), directory)


def load(rank, world_size, parallel, directory):
    """Names of the parameters that are not, bit by bit, this rank's slice of what was saved."""
    from megatron.core import dist_checkpointing

    layer, pg = moe.build_layer(parallel)
    loaded = dist_checkpointing.load(layer.sharded_state_dict(prefix="layer."), directory)
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in loaded.items()})
    whole = moe.whole_weights()
    expected = {name: moe.local_slice(name, whole[name], pg) for name, _ in layer.mlp.named_parameters()}
    return [name for name, p in layer.mlp.named_parameters() if not torch.equal(p, expected[name])]


LAYOUTS = [
    (1, ParallelConfig()),
    (2, ParallelConfig(expert=2)),
    (2, ParallelConfig(tensor=2, expert_tensor=2)),
    (4, ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
]


@pytest.mark.parametrize("saved_in", LAYOUTS, ids=["one_rank", "EP2", "ETP2", "EP2_ETP2"])
def test_a_checkpoint_of_one_layout_loads_bit_identically_in_every_other(distributed, tmp_path, saved_in):
    world_size, parallel = saved_in
    distributed(world_size, save, parallel, str(tmp_path))
    for world_size, parallel in LAYOUTS:
        assert distributed(world_size, load, parallel, str(tmp_path)) == [[]] * world_size
