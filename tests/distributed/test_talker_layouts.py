"""The Talker trains alike in every layout, above the live Thinker, on stored states and on speech alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_train.recipe.schema import CheckpointConfig, ParallelConfig, Recompute, States
from tests.distributed.test_layouts import assert_same
from tests.support.talker import small_talker, speech_batches
from tests.support.thinker import encoders, small_recipe

LAYOUTS = {
    "TP2": (2, ParallelConfig(tensor=2)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "CP2": (2, ParallelConfig(context=2)),
    "EP2-DP2": (2, ParallelConfig(expert=2)),
    "TP2-PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "PP2-VPP2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "CP2-EP2-ETP2": (4, ParallelConfig(context=2, expert=2, expert_tensor=2)),
}


def save_thinker(rank, world_size, folder):
    """Write a Thinker's checkpoint."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(ParallelConfig(), **encoders())
    platform.parallel.initialize(recipe.parallel, 31)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, build_chunks(recipe), None, {}, None)
    store.close()
    platform.parallel.destroy()


def train(rank, world_size, parallel, folder, start, save, changes, steps=3):
    """Train on fixed global batches from the checkpoint `start` (None: write it), returning metrics by step."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import load_model
    from omni_train.recipe.networks import held
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_talker(parallel, **changes)
    recipe.talker_training = replace(recipe.talker_training, thinker=str(Path(folder) / "thinker"))
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    before = [
        parameter.clone() for model in engine.frozen.values() for m in model.modules for parameter in m.parameters()
    ]
    if start is not None:
        load_model(engine.chunks, Path(start), held(recipe))
        engine.optimizer.reload_model_params()
    if save is not None:
        store = engine.open_store(Path(folder) / save)
        engine.save(store, 0, {}, None)
        store.finish(blocking=True)
        store.close()
    world, mine = platform.parallel.data_world_size(), platform.parallel.data_rank()
    history = []
    for step, rows in enumerate(speech_batches(steps, recipe)):
        share = len(rows) // world
        result = engine.train_step(rows[mine * share : (mine + 1) * share], learning_rate=1e-4, step=step)
        assert result.updated
        history.append(result.metrics)
    after = [parameter for model in engine.frozen.values() for m in model.modules for parameter in m.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert bool(before) == (recipe.data.speech.states is States.live)
    platform.parallel.destroy()
    return history


@pytest.fixture(scope="module")
def folder(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker")
    distributed(1, save_thinker, folder / "thinker")
    return folder


@pytest.fixture(scope="module")
def live(distributed, folder):
    return distributed(1, train, ParallelConfig(), folder, None, "live", {})[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_above_the_live_thinker_every_layout_trains_like_one_rank(distributed, folder, live, name):
    world_size, parallel = LAYOUTS[name]
    start = folder / "live" / "step_00000000"
    for history in distributed(world_size, train, parallel, folder, start, None, {}):
        assert_same(live, history)


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_recomputation_changes_nothing(distributed, folder, live, recompute):
    start = folder / "live" / "step_00000000"
    for history in distributed(2, train, ParallelConfig(tensor=2), folder, start, None, {"recompute": recompute}):
        assert_same(live, history)


@pytest.fixture(scope="module")
def alone(distributed, folder):
    return distributed(1, train, ParallelConfig(), folder, None, "alone", {"states": States.none})[0]


@pytest.mark.parametrize("name", ["TP2", "CP2", "PP2"])
def test_speech_alone_trains_alike_in_every_layout(distributed, folder, alone, name):
    world_size, parallel = LAYOUTS[name]
    start = folder / "alone" / "step_00000000"
    for history in distributed(world_size, train, parallel, folder, start, None, {"states": States.none}):
        assert_same(alone, history)
