"""The counted operations are those that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omni_train.models.thinker.flops import flops_per_token, step_flops
from omni_train.recipe.schema import ModelConfig, ThinkerConfig
from tests.support.thinker import random_row, small_recipe

DENSE = {"pattern": "*-", "repeats": 3, "intermediate_size": 52, "num_experts": 0, "num_experts_per_tok": 0}


def count_matrix_products(rank, world_size, changes):
    """Operations of the linear layers and the head in one step, as torch counts them."""
    from omni_train import platform
    from omni_train.models.row import LocalRow
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(**changes)
    platform.parallel.initialize(recipe.parallel, 5)
    model = build_chunks(recipe)[0]
    row = LocalRow.from_batch(random_row([96], 96, seed=3))
    with FlopCounterMode(display=False) as counter:
        model.logits(model(row)).sum().backward()
    products = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
    platform.parallel.destroy()
    return sum(value for op, value in counter.get_flop_counts()["Global"].items() if op in products)


@pytest.mark.parametrize("gate", [True, False])
def test_dense_layers_and_head_count_what_torch_counts(distributed, gate):
    changes = (
        DENSE | {"attention_output_gate": gate} | {"moe_intermediate_size": 0, "shared_expert_intermediate_size": 0}
    )
    counted = distributed(1, count_matrix_products, changes)[0]
    expected = 3 * 96 * flops_per_token(small_recipe(**changes).model)
    assert counted == pytest.approx(expected, rel=1e-9)


def test_attention_counts_the_causal_half_of_each_sequence_without_padding():
    model = small_recipe(**DENSE).model
    row = random_row([37, 11, 25], 96, seed=1)
    linear = 73 * flops_per_token(model)
    pairs = sum(length * (length + 1) // 2 for length in (37, 11, 25))
    attention = 3 * 4 * model.thinker.num_attention_heads * model.thinker.head_dim * pairs
    assert step_flops(model, [row]) == pytest.approx(3 * (linear + attention))


def test_a_35b_a3b_token_costs_about_twice_its_active_parameters():
    thinker = ThinkerConfig(
        hidden_size=2048,
        repeats=10,
        num_attention_heads=16,
        num_key_value_heads=2,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    )
    model = ModelConfig(name="flash", vocab_size=248320, thinker=thinker)
    assert 2 * 2.7e9 < flops_per_token(model) < 2 * 3.5e9
