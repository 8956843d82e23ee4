"""The mixture of experts equals transformers' block, and itself in every layout, auxiliary loss included."""

import contextlib
from unittest.mock import patch

import pytest
import torch

from omni_train.platform import cpu_streams
from omni_train.recipe.schema import ParallelConfig
from tests.support import moe

TOKENS = 24


def hidden_states(seed=2):
    return torch.randn(TOKENS, 1, moe.HIDDEN, generator=torch.Generator().manual_seed(seed))


def padding():
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    mask[[5, 6, 7, 20, 21, 22, 23]] = True
    return mask


def loss_of(output):
    """A loss whose gradient differs from token to token."""
    return (output**2 * torch.linspace(0.5, 1.5, output.shape[-1])).sum()


def reference_gradients(rank, world_size):
    """Output and gradients of transformers' block with the same weights."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    block = Qwen3_5MoeSparseMoeBlock(
        Qwen3_5MoeTextConfig(
            hidden_size=moe.HIDDEN,
            num_experts=moe.EXPERTS,
            num_experts_per_tok=moe.TOP_K,
            moe_intermediate_size=moe.WIDTH,
            shared_expert_intermediate_size=moe.SHARED_WIDTH,
        )
    )
    whole = moe.whole_weights()
    gate, up = whole["shared_experts.linear_fc1.weight"].chunk(2)
    names = {
        "gate.weight": whole["router.weight"],
        "experts.gate_up_proj": whole["experts.linear_fc1.weight"],
        "experts.down_proj": whole["experts.linear_fc2.weight"],
        "shared_expert.gate_proj.weight": gate,
        "shared_expert.up_proj.weight": up,
        "shared_expert.down_proj.weight": whole["shared_experts.linear_fc2.weight"],
        "shared_expert_gate.weight": whole["shared_experts.gate_weight"],
    }
    block.load_state_dict(names)
    inputs = hidden_states().requires_grad_()
    output = block(inputs.transpose(0, 1)).transpose(0, 1)
    loss_of(output).backward()
    grads = {name: p.grad for name, p in block.named_parameters()}
    return {
        "output": output.detach(),
        "input": inputs.grad,
        "router.weight": grads["gate.weight"],
        "experts.linear_fc1.weight": grads["experts.gate_up_proj"],
        "experts.linear_fc2.weight": grads["experts.down_proj"],
        "shared_experts.linear_fc1.weight": torch.cat(
            [grads["shared_expert.gate_proj.weight"], grads["shared_expert.up_proj.weight"]]
        ),
        "shared_experts.linear_fc2.weight": grads["shared_expert.down_proj.weight"],
        "shared_experts.gate_weight": grads["shared_expert_gate.weight"],
    }


def mine(pg, whole):
    """This rank's tokens: data-parallel ranks divide the row, and with sequence parallelism so do tensor ranks."""
    part = whole.chunk(pg.dp.size())[pg.dp.rank()]
    return part.chunk(pg.tp.size())[pg.tp.rank()]


def gradients(rank, world_size, parallel, options=None):
    """Differences from transformers' values, {name: largest}, after the sums that Megatron's reduction would do."""
    expected = reference_gradients(rank, world_size)
    layer, pg = moe.build_layer(parallel, **(options or {}))
    mixture = layer.mlp
    moe.fill(mixture, moe.whole_weights(), pg)
    inputs = mine(pg, hidden_states()).clone().requires_grad_()
    output, _ = mixture(inputs)
    loss_of(output).backward()

    found = {
        "output": (output.detach(), mine(pg, expected["output"])),
        "input": (inputs.grad, mine(pg, expected["input"])),
    }
    for name, parameter in mixture.named_parameters():
        if name.startswith("experts."):
            torch.distributed.all_reduce(parameter.grad, group=pg.expt_dp)
        else:
            torch.distributed.all_reduce(parameter.grad, group=pg.dp)
            if not name.startswith("shared_experts.linear"):
                assert parameter.sequence_parallel == (parallel.tensor > 1)
                torch.distributed.all_reduce(parameter.grad, group=pg.tp)
        found[name] = (parameter.grad, moe.local_slice(name, expected[name], pg))
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in found.items()}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(expert=2)),
        (2, ParallelConfig(tensor=2)),
        (2, ParallelConfig(tensor=2, expert=2)),
        (2, ParallelConfig(tensor=2, expert_tensor=2)),
        (4, ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
    ],
    ids=["one_rank", "EP2", "TP2", "TP2_EP2", "TP2_ETP2", "TP2_EP2_ETP2"],
)
def test_output_and_every_gradient_equal_transformers_in_every_layout(distributed, world_size, parallel):
    for differences in distributed(world_size, gradients, parallel):
        assert len(differences) == 8
        assert max(differences.values()) < 1e-5, differences


def test_recomputation_changes_nothing(distributed):
    options = dict(recompute_granularity="selective", recompute_modules=["moe"])
    (differences,) = distributed(1, gradients, ParallelConfig(), options)
    assert max(differences.values()) < 1e-5, differences


def host_reads(rank, world_size, parallel):
    """Ways in which the host reads a tensor's values during a pass in both directions."""
    layer, pg = moe.build_layer(parallel)
    moe.fill(layer.mlp, moe.whole_weights(), pg)
    reads = set()

    def noted(name, function):
        def read(self, *args, **kwargs):
            reads.add(name)
            return function(self, *args, **kwargs)

        return read

    inputs = mine(pg, hidden_states()).clone().requires_grad_()
    with contextlib.ExitStack() as stack:
        for name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(patch.object(torch.Tensor, name, noted(name, getattr(torch.Tensor, name))))
        stack.enter_context(patch.object(cpu_streams, "to_host", noted("to_host", cpu_streams.to_host)))
        output, _ = layer.mlp(inputs)
        loss_of(output).backward()
    return reads


def test_the_host_reads_nothing_where_no_rows_are_exchanged(distributed):
    """A GPU would stand still for it in every layer. Between ranks the collectives must know how much they send."""
    assert distributed(1, host_reads, ParallelConfig()) == [set()]
    assert distributed(2, host_reads, ParallelConfig(expert=2)) == [{"to_host", "numpy", "tolist"}] * 2


def unsupported(rank, world_size):
    with pytest.raises(ValueError, match="moe_expert_capacity_factor must be unset with RowDispatcher"):
        moe.build_layer(ParallelConfig(), moe_expert_capacity_factor=1.5)


def test_options_that_drop_tokens_are_refused(distributed):
    distributed(1, unsupported)


def balanced_router_gradients(rank, world_size, parallel, micro_batches):
    """The router's gradient from the auxiliary loss alone in the second step, and what `end_step` says of both."""
    from omni_train.nn import balance

    layer, pg = moe.build_layer(parallel)
    moe.fill(layer.mlp, moe.whole_weights(), pg)
    layer.train()
    layer.mlp.router.coefficient = 0.7
    metrics = []
    for step in range(2):
        layer.zero_grad()
        balance.begin_step([layer], step_tokens=float((~padding()).sum()))
        rows = [mine(pg, whole) for whole in hidden_states(seed=step).chunk(micro_batches)]
        masks = [mine(pg, whole) for whole in padding().chunk(micro_batches)]
        for row, mask in zip(rows, masks, strict=True):
            output, _ = layer.mlp(row, padding_mask=mask[None])
            (output * 0).sum().backward()
        metrics.append(balance.end_step([layer], group=pg.tp_dp_cp, pipeline_group=pg.pp))
    gradient = layer.mlp.router.weight.grad
    torch.distributed.all_reduce(gradient, group=pg.tp_dp_cp)
    return gradient, metrics


def expected_balance():
    """The same from the definition: E·Σ fᵢ·Pᵢ over real tokens, f of the step before, P of this one."""
    weight = moe.whole_weights()["router.weight"].requires_grad_()
    load, metrics = torch.ones(moe.EXPERTS), []
    for step in range(2):
        logits = hidden_states(seed=step)[~padding()][:, 0] @ weight.T
        mean_probs = logits.softmax(-1).mean(0)
        loss = 0.7 * (load * mean_probs).sum()
        counts = logits.topk(moe.TOP_K).indices.flatten().bincount(minlength=moe.EXPERTS)
        load = counts * moe.EXPERTS / counts.sum()
        metrics.append(
            {
                "aux_loss": (load * mean_probs).sum().item(),
                "expert_load_max": load.max().item(),
                "expert_load_min": load.min().item(),
            }
        )
    loss.backward()
    return weight.grad, metrics


@pytest.mark.parametrize(
    ("world_size", "parallel", "micro_batches"),
    [
        (1, ParallelConfig(), 1),
        (1, ParallelConfig(), 3),
        (2, ParallelConfig(), 1),
        (2, ParallelConfig(expert=2), 2),
        (2, ParallelConfig(tensor=2), 1),
    ],
    ids=["one_rank", "three_micro_batches", "DP2", "EP2_two_micro_batches", "TP2"],
)
def test_auxiliary_loss_is_that_of_the_global_batch_in_every_layout(distributed, world_size, parallel, micro_batches):
    expected_gradient, expected_metrics = expected_balance()
    assert expected_gradient.abs().max() > 1e-3
    for gradient, metrics in distributed(world_size, balanced_router_gradients, parallel, micro_batches):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
        for found, expected in zip(metrics, expected_metrics, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
