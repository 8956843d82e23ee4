"""Stored states give what the live Thinker does, from the shards to the losses, whatever layout wrote or reads them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from omni_train.recipe.schema import CheckpointConfig, ParallelConfig
from tests.support.spoken_shards import spoken_recipe, stored, write_spoken

LAYOUTS = {
    "TP2": (2, ParallelConfig(tensor=2)),
    "CP2": (2, ParallelConfig(context=2)),
}


def save_thinker(rank, world_size, folder, seed=31, parallel=None):
    """Write a Thinker's checkpoint; two seeds differ in the layers above the states alone where they are negative."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks

    recipe = spoken_recipe(Path("none"), parallel)
    platform.parallel.initialize(recipe.parallel, seed)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), replace(recipe.model, talker=None))
    store.save(0, build_chunks(recipe), None, {}, None)
    store.close()
    platform.parallel.destroy()


def write(rank, world_size, recipe, out):
    """Write the states of a recipe's sources."""
    from omni_train import platform
    from omni_train.training.states import finish, make

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    with ExitStack() as locks:
        folders = make(recipe, Path(out), locks)
        if rank == 0:
            finish(recipe, Path(out), folders)
    platform.parallel.destroy()


def train(rank, world_size, recipe, steps=4):
    """Metrics of the first steps on a recipe's shards, and of held-out rows after them.

    The first call writes the checkpoint that the others start from.
    """
    from omni_train import platform
    from omni_train.checkpoint.sharded import load_model
    from omni_train.recipe.networks import held
    from omni_train.training.engines.megatron import MegatronEngine
    from omni_train.training.feed import Feed

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    store = engine.open_store(Path(recipe.runs_dir))
    if (start := store.latest()) is None:
        engine.save(store, 0, {}, None)
        store.finish(blocking=True)
    else:
        load_model(engine.chunks, start, held(recipe))
        engine.optimizer.reload_model_params()
    store.close()
    feed = Feed(recipe)
    count = recipe.schedule.global_batch // platform.parallel.data_world_size()
    history = [engine.train_step(feed.rows(count), learning_rate=1e-3, step=step).metrics for step in range(steps)]
    held_out = engine.evaluate(feed.held_out(2))
    feed.close()
    platform.parallel.destroy()
    return [*history, held_out]


@pytest.fixture(scope="module")
def world(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoken")
    write_spoken(folder / "data")
    distributed(1, save_thinker, folder / "thinker")
    return folder


def recipe_of(world, parallel=None, **changes):
    recipe = spoken_recipe(world / "data", parallel, **changes)
    recipe.talker_training = replace(recipe.talker_training, thinker=str(world / "thinker" / "step_00000000"))
    recipe.runs_dir = str(world / "runs")
    return recipe


@pytest.fixture(scope="module")
def written(distributed, world):
    distributed(1, write, recipe_of(world), world / "out")
    return world / "out"


def test_stored_states_train_as_the_live_thinker_does(distributed, world, written):
    live = recipe_of(world)
    (expected,), (found,) = distributed(1, train, live), distributed(1, train, stored(live, written))
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        assert after == pytest.approx(before, rel=1e-5)
