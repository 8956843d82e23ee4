"""Freezing, parameter groups and the guarded step, on the real optimizer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from omni_train.recipe.schema import ParallelConfig, ParamGroupConfig, Precision
from tests.support.pool import RankFailed
from tests.support.thinker import global_batches, small_recipe


def engine_of(recipe):
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    return MegatronEngine(recipe)


def snapshot(engine) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): parameter.detach().clone()
        for chunk in engine.chunks
        for name, parameter in chunk.named_parameters()
    }


def train_and_compare(rank, world_size, parallel, changes):
    """Names of parameters that two steps changed, and of those they left bit-identical."""
    engine = engine_of(small_recipe(parallel, **changes))
    before = snapshot(engine)
    for rows in global_batches(2):
        engine.train_step(rows, learning_rate=1e-3)
    after = snapshot(engine)
    same = {name for name in before if torch.equal(before[name], after[name])}
    return set(before) - same, same


@pytest.mark.parametrize("precision", list(Precision))
def test_frozen_parameters_stay_bit_identical_and_the_others_all_move(distributed, precision):
    changes = {"trainable": ["decoder.layers.*.mlp.*", "final_norm.weight"], "precision": precision}
    for moved, same in distributed(2, train_and_compare, ParallelConfig(tensor=2), changes):
        assert all(".mlp." in name or name == "final_norm.weight" for name in moved)
        assert not any(".mlp." in name or name == "final_norm.weight" for name in same)
        assert "embedding.word_embeddings.weight" in same


def test_every_parameter_is_trained_by_default(distributed):
    changes = {"mtp_num_hidden_layers": 1}
    (moved, same), *_ = distributed(1, train_and_compare, ParallelConfig(), changes)
    assert not same, same
    assert any(name.startswith("mtp.") for name in moved)


def test_a_trainable_pattern_that_matches_nothing_is_refused(distributed):
    with pytest.raises(RankFailed, match=r"trainable: the pattern 'decodr\.\*' matches no parameter"):
        distributed(1, train_and_compare, ParallelConfig(), {"trainable": ["decodr.*", "final_norm.*"]})


def group_values(rank, world_size, groups):
    from omni_train.training.engines.optimizer import set_learning_rate

    recipe = small_recipe()
    recipe.optimizer.groups = groups
    engine = engine_of(recipe)
    set_learning_rate(engine.optimizer.param_groups, 2.0, 0.5)
    values = {}
    for group in engine.optimizer.param_groups:
        key = (group["lr"], group["weight_decay"])
        values[key] = values.get(key, 0) + sum(parameter.numel() for parameter in group["params"])
    total = {
        name.removeprefix("module."): (parameter.numel(), parameter.dim())
        for name, parameter in engine.chunks[0].named_parameters()
    }
    return values, total


def test_groups_scale_the_learning_rate_and_decay_spares_vectors(distributed):
    groups = [
        ParamGroupConfig(match="embedding.*", lr_factor=0.25, weight_decay_factor=0.0),
        ParamGroupConfig(match="decoder.*.router.weight", lr_factor=0.5),
    ]
    values, total = distributed(1, group_values, groups)[0]
    embedding = sum(size for name, (size, _) in total.items() if name.startswith("embedding."))
    routers = sum(size for name, (size, _) in total.items() if name.endswith("router.weight"))
    vectors = sum(size for _, (size, dim) in total.items() if dim < 2)
    assert values.pop((0.5, 0.0)) == embedding
    assert values.pop((1.0, 0.5)) == routers
    assert values.pop((2.0, 0.0)) == vectors
    assert values.pop((2.0, 0.5)) == sum(size for size, _ in total.values()) - embedding - routers - vectors
    assert not values


def poisoned_step(rank, world_size, parallel):
    """One step with a non-finite parameter on one rank's part, then one without."""
    engine = engine_of(small_recipe(parallel))
    batches = global_batches(2)
    weight = next(p for name, p in engine.chunks[0].named_parameters() if name.endswith("linear_fc2.weight"))
    keep = weight.detach().clone()
    if rank == 0:
        with torch.no_grad():
            weight.view(-1)[0] = math.nan
    before = snapshot(engine)
    bad = engine.train_step(batches[0], learning_rate=1e-3)
    after = snapshot(engine)
    unchanged = all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    with torch.no_grad():
        weight.copy_(keep)
    engine.optimizer.reload_model_params()
    good = engine.train_step(batches[1], learning_rate=1e-3)
    return bad.updated, unchanged, good.updated, good.metrics["loss"]


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(pipeline=2), ParallelConfig(tensor=2)])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(distributed, parallel):
    world_size = parallel.pipeline * parallel.tensor
    for bad, unchanged, good, loss in distributed(world_size, poisoned_step, parallel):
        assert not bad
        assert unchanged
        assert good
        assert math.isfinite(loss)


def clipped_update(rank, world_size, parallel):
    """Gradient norm and the largest change of plain gradient descent's direction, before and after clipping."""
    recipe = small_recipe(parallel, router_aux_loss_coef=0.0)
    engine = engine_of(recipe)
    rows = global_batches(1)[0]
    from omni_train.nn import balance
    from omni_train.objectives.base import GlobalBatch
    from omni_train.training.engines import optimizer
    from omni_train.training.engines.base import global_sums

    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    sums = global_sums(engine.objective, rows)
    balance.begin_step(engine.chunks, sums.tokens)
    engine._go_over(rows, GlobalBatch(sums.weight, 0, training=True))
    engine.optimizer.prepare_grads()
    norm = float(engine.optimizer.get_grad_norm())
    optimizer._scale_gradients(engine.optimizer, 0.25)
    return norm, float(engine.optimizer.get_grad_norm())


def test_clipping_scales_the_gradients_that_the_optimizer_uses(distributed):
    for norm, clipped in distributed(2, clipped_update, ParallelConfig(tensor=2)):
        assert clipped == pytest.approx(norm / 4, rel=1e-5)


def test_step_counts_lie_where_the_fused_update_reads_them():
    """Megatron loads one count on the host; a GPU's fused kernel cannot read it. `meta` is a device unlike the host."""
    from omni_train.checkpoint.distributed_optimizer import _adapt_torch_adamw

    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, device="meta")) for _ in range(2)])

    def load(state_dict):
        state, groups = inner.state_dict().values()
        for group in groups:
            group["fused"] = None  # as another Adam wrote them
        for one in state.values():
            one["step"] = state_dict["step"]
        inner.load_state_dict({"state": state, "param_groups": groups})

    part = SimpleNamespace(
        optimizer=inner, state_dict=None, load_state_dict=load, _set_main_param_and_optimizer_states=None
    )
    _adapt_torch_adamw(part)
    for loaded in (False, True):
        if loaded:
            part.load_state_dict({"step": torch.tensor(7.0)})
        steps = [state["step"] for state in inner.state.values()]
        assert [step.device.type for step in steps] == ["meta", "meta"]
        assert steps[0] is not steps[1]
        assert all(group["fused"] for group in inner.param_groups)
