"""Master weights and both moments of every parameter come out of a checkpoint as they went in, to the last bit."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from omni_train.errors import UserError
from omni_train.recipe.schema import CheckpointConfig, OptimizerConfig, OptimizerName, ParallelConfig, Precision
from tests.distributed.test_checkpoints import read_plain
from tests.distributed.test_layouts import assert_same
from tests.support.pool import RankFailed
from tests.support.thinker import encoders, global_batches, media_batches, small_recipe

# The embedding is tied, so it has a bucket of its own; with these sizes the one before it is padded on the first stage.
CHANGES = {"tie_word_embeddings": True, "mtp_num_hidden_layers": 1, "shared_expert_intermediate_size": 24}
SMALL = 3000  # elements in a bucket: a few parameters, or one
VPP = ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2)
LAYOUTS = {
    "PP2-VPP2-EP2 in small buckets": (4, VPP, SMALL),
    "DP3 in small buckets": (3, ParallelConfig(), SMALL),
    "TP2-PP2-EP2 in small buckets": (4, ParallelConfig(tensor=2, pipeline=2, expert=2), SMALL),
    "one rank": (1, ParallelConfig(), None),
}


def in_buckets(size: int | None):
    """Cut gradient buffers into buckets of `size` elements, as Megatron does with overlap, or leave them whole."""
    if size is None:
        return contextlib.nullcontext()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    lay_out = DistributedOptimizer._compute_per_buffer_param_layout
    small = staticmethod(lambda params, bucket_size, *rest: lay_out(params, size, *rest))
    return patch.object(DistributedOptimizer, "_compute_per_buffer_param_layout", small)


def without_repair():
    """Megatron 0.19.2 as it is, but for what it warns of."""
    from omni_train.checkpoint import distributed_optimizer

    return patch.object(distributed_optimizer, "_correct_offsets", lambda part: None)


def without_guard():
    """Megatron's warnings as warnings."""
    return patch.object(logging.getLogger("megatron.core.optimizer.distrib_optimizer"), "filter", bool)


def begin(parallel, **changes):
    from omni_train import platform

    recipe = small_recipe(parallel, **CHANGES | changes)
    platform.parallel.initialize(parallel, recipe.seed)
    return recipe


def build(recipe, bucket):
    from omni_train.training.engines.megatron import MegatronEngine

    with in_buckets(bucket):
        return MegatronEngine(recipe)


def open_store(folder, recipe):
    from omni_train.checkpoint.sharded import CheckpointStore

    return CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), recipe.model)


def train(engine, first: int, last: int, rows: int = 4) -> list[dict[str, float]]:
    """Metrics of steps after `first` to `last`, of `rows` rows each."""
    from omni_train import platform

    drawn = [row for batch in global_batches(last * rows // 2) for row in batch]
    share, mine = rows // platform.parallel.data_world_size(), platform.parallel.data_rank()
    starts = [step * rows + mine * share for step in range(first, last)]
    return [engine.train_step(drawn[start : start + share], learning_rate=3e-4).metrics for start in starts]


def held(engine) -> list[torch.Tensor]:
    """What this rank holds of every parameter, in the order of their names: master weights and both moments."""
    from omni_train.checkpoint.distributed_optimizer import _distributed_parts

    names = {p: (i, name) for i, chunk in enumerate(engine.chunks) for name, p in chunk.named_parameters()}
    states = {
        names[parameter]: part._get_main_param_and_optimizer_states(parameter)
        for part in _distributed_parts(engine.optimizer)
        for parameter in part.model_param_group_index_map
    }
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return [states[name][kind].detach().clone() for name in sorted(states) for kind in kinds]


def pads(engine) -> bool:
    """Whether, on this rank, a bucket that others follow has padding at its end."""
    from omni_train.checkpoint.distributed_optimizer import _distributed_parts

    buffers = [buffer for part in _distributed_parts(engine.optimizer) for buffer in part.buffers]
    return any(bucket.grad_data.numel() > bucket.numel_unpadded for buffer in buffers for bucket in buffer.buckets[:-1])


def save_and_load(rank, world_size, parallel, bucket, folder, start):
    """Two steps, or what `start` holds, through a checkpoint in `folder`.

    Returns:
        the checkpoint; whether all is held as before; whether this layout has padding before a parameter.
    """
    recipe = begin(parallel)
    engine, store = build(recipe, bucket), open_store(folder, recipe)
    if start is None:
        train(engine, 0, 2)
    else:
        engine.resume(store, Path(start))
    engine.save(store, 2, {}, None)
    again = build(recipe, bucket)
    again.resume(store, store.latest())
    same = all(torch.equal(one, other) for one, other in zip(held(engine), held(again), strict=True))
    return str(store.latest()), same, pads(engine)


def test_every_layout_keeps_masters_and_moments_of_every_parameter(distributed, tmp_path):
    """Each layout goes on from the one before: all checkpoints hold the same tensors as the first."""
    path, expected = None, None
    for name, (world_size, parallel, bucket) in LAYOUTS.items():
        results = distributed(world_size, save_and_load, parallel, bucket, tmp_path / name, path)
        path = results[0][0]
        assert all(same for _, same, _ in results), name
        assert results[0][2] == (world_size > 1), name
        tensors = distributed(1, read_plain, path)[0]
        expected = expected or tensors
        assert tensors.keys() == expected.keys()
        assert {key for key in tensors if not torch.equal(tensors[key], expected[key])} == set(), name
    trained = {key.removeprefix("optimizer.state.exp_avg.") for key in expected if ".exp_avg." in key}
    assert {"embedding.word_embeddings.weight", "final_norm.weight"} < trained


def stop_and_resume(rank, world_size, parallel, bucket, rows, folder):
    """Metrics of steps 4 to 6 without a stop, and resumed from the checkpoint after step 3."""
    recipe = begin(parallel)
    engine, store = build(recipe, bucket), open_store(folder, recipe)
    train(engine, 0, 3, rows)
    engine.save(store, 3, {}, None)
    on = train(engine, 3, 6, rows)
    again = build(recipe, bucket)
    again.resume(store, store.latest())
    return on, train(again, 3, 6, rows), pads(engine)


def take_over(rank, world_size, checkpoint, rows):
    """Metrics of steps 4 to 6 on this one rank."""
    recipe = begin(ParallelConfig())
    engine = build(recipe, None)
    engine.resume(open_store(checkpoint.parent, recipe), checkpoint)
    return train(engine, 3, 6, rows)


@pytest.mark.parametrize(
    ("world_size", "parallel", "bucket", "rows"),
    [(4, VPP, None, 4), (3, ParallelConfig(), SMALL, 6)],
    ids=["PP2-VPP2-EP2", "DP3 in small buckets"],
)
def test_resumed_it_trains_as_if_it_had_never_stopped(distributed, tmp_path, world_size, parallel, bucket, rows):
    results = distributed(world_size, stop_and_resume, parallel, bucket, rows, tmp_path)
    for on, resumed, _ in results:
        assert resumed == on
    assert results[0][2]
    assert_same(results[0][0], distributed(1, take_over, tmp_path / "step_00000003", rows)[0])


UNTIED = {"tie_word_embeddings": False, "mtp_num_hidden_layers": 0}
HALF = 70_000  # elements in a bucket: about half of the model, so that the first bucket has the last layers


def save_unrepaired(rank, world_size, folder, guarded):
    with without_repair(), contextlib.nullcontext() if guarded else without_guard():
        recipe = begin(ParallelConfig(), **UNTIED)
        engine, store = build(recipe, HALF), open_store(folder, recipe)
        train(engine, 0, 1)
        engine.save(store, 1, {}, None)


def weights_loss(rank, world_size, folder):
    """Loss of the next step, from the weights of the checkpoint alone."""
    recipe = begin(ParallelConfig(), **UNTIED, init_from=str(folder))
    engine = build(recipe, None)
    engine.initialize(open_store(folder, recipe))
    return train(engine, 1, 2)[0]["loss"]


def what_stops(rank, world_size, folder):
    """What resuming on two pipeline stages is refused with; then the loss of a run that starts from the weights."""
    recipe = begin(ParallelConfig(pipeline=2), **UNTIED, init_from=str(folder))
    engine, store = build(recipe, None), open_store(folder, recipe)
    with pytest.raises(UserError) as refused:
        engine.resume(store, store.latest())
    engine.initialize(store)
    return str(refused.value), train(engine, 1, 2)[0]["loss"]


def test_state_at_wrong_offsets_is_refused_on_all_ranks_and_its_weights_can_be_started_from(distributed, tmp_path):
    """Here only the layers of the first stage are wrong."""
    distributed(1, save_unrepaired, tmp_path, False)
    expected = distributed(1, weights_loss, tmp_path)[0]
    for refused, loss in distributed(2, what_stops, tmp_path):
        assert refused.startswith(f"{tmp_path}/step_00000001: its optimizer state is not that of its weights")
        assert f"init_from={tmp_path}/step_00000001" in refused
        assert "\n" not in refused
        assert loss == pytest.approx(expected, rel=1e-4)


def test_what_megatron_only_warns_of_is_an_error(distributed, tmp_path):
    with pytest.raises(RankFailed, match=r"UserError: megatron-core 0\.19\.2 would write .* at wrong offsets"):
        distributed(1, save_unrepaired, tmp_path, True)
    assert not list(tmp_path.glob("step_*[0-9]"))


def change_precision(rank, world_size, folder):
    """A checkpoint of each precision, read by a run of the other: whether masters and moments are as they were."""
    from omni_train import platform

    same = []
    for written, read in ((Precision.bf16, Precision.fp32), (Precision.fp32, Precision.bf16)):
        recipe = begin(ParallelConfig(), precision=written)
        engine, store = build(recipe, SMALL), open_store(folder / written, recipe)
        train(engine, 0, 2)
        engine.save(store, 2, {}, None)
        again = build(replace(recipe, precision=read), SMALL)
        again.resume(store, store.latest())
        same.append(all(torch.equal(one, other) for one, other in zip(held(engine), held(again), strict=True)))
        platform.parallel.destroy()
    return same


def test_a_run_may_change_its_precision_when_it_resumes(distributed, tmp_path):
    assert distributed(1, change_precision, tmp_path) == [[True, True]]


def change_settings(rank, world_size, folder, name):
    """Metrics after a checkpoint in the run that wrote it, its settings then changed by hand, and in one resumed with
    them; and what the groups of the resumed one hold."""
    first = OptimizerConfig(name=name, lr=1e-3, eps=1e-5)
    later = OptimizerConfig(
        name=name, lr=2e-3, min_lr=1e-4, betas=[0.8, 0.7], eps=1e-2, weight_decay=0.3, clip_grad=0.2
    )
    recipe = begin(ParallelConfig(), optimizer=first)
    engine, store = build(recipe, None), open_store(folder, recipe)
    train(engine, 0, 2)
    engine.save(store, 2, {}, None)
    changed = replace(recipe, optimizer=later)
    engine.recipe = changed
    for group in engine.optimizer.param_groups:
        if "betas" in group:
            group["betas"], group["eps"] = (0.8, 0.7), 1e-2
    on = train(engine, 2, 5)
    again = build(changed, None)
    again.resume(store, store.latest())
    resumed = train(again, 2, 5)
    rates = {(group["max_lr"], group["min_lr"]) for group in again.optimizer.param_groups}
    return on, resumed, rates, all(torch.equal(a, b) for a, b in zip(weights(engine), weights(again), strict=True))


def weights(engine) -> list[torch.Tensor]:
    return [parameter.detach() for chunk in engine.chunks for parameter in chunk.parameters()]


@pytest.mark.parametrize("name", OptimizerName)
def test_changed_rates_moments_and_clipping_take_effect_when_a_run_resumes(distributed, tmp_path, name):
    on, resumed, rates, same = distributed(1, change_settings, tmp_path, name)[0]
    assert resumed == on and same
    assert rates == {(2e-3, 1e-4)}


def train_the_adapter(rank, world_size, folder, optimizer):
    """Loss and gradient norm of the step after a checkpoint, in the run that wrote it and in the one that resumed."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_recipe(ParallelConfig(pipeline=2), **encoders(), trainable=["audio_adapter.*"], optimizer=optimizer)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    first, second = media_batches(2)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), recipe.model)
    engine = MegatronEngine(recipe)
    engine.train_step(first, 1e-3)
    engine.save(store, 1, {}, None)
    straight = engine.train_step(second, 1e-3, 1).metrics
    resumed = MegatronEngine(recipe)
    resumed.resume(store, store.latest())
    again = resumed.train_step(second, 1e-3, 1).metrics
    store.close()
    platform.parallel.destroy()
    return [(metrics["loss"], metrics["grad_norm"]) for metrics in (straight, again)]


@pytest.mark.parametrize("name", OptimizerName)
def test_a_pipeline_stage_that_trains_nothing_is_saved_and_resumed(distributed, tmp_path, name):
    """S1 over pipeline stages: the adapter stands on the first, and Megatron's AdamW has no step to save elsewhere."""
    for straight, again in distributed(2, train_the_adapter, tmp_path, OptimizerConfig(name=name, lr=1e-3)):
        assert again == straight and straight[1] > 0.0
