"""A checkpoint does not know the layout that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_train.errors import UserError
from omni_train.recipe.schema import CheckpointConfig, ParallelConfig, Precision
from tests.distributed.test_layouts import LAYOUTS, assert_same
from tests.support.thinker import global_batches, small_recipe


def train(rank, world_size, parallel, folder, load, save, first, last, changes):
    """Steps `first` to `last` from the checkpoint `load`, then save under `save`."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_recipe(parallel, **changes)
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    store = CheckpointStore(Path(folder) / save, CheckpointConfig(asynchronous=first == 0), recipe.model)
    if load is not None:
        progress = store.load(Path(load), engine.chunks, engine.optimizer)
        assert progress == {"tokens": 17.0, "skipped_samples": {"broken_json": 3}}
    world, mine = platform.parallel.data_world_size(), platform.parallel.data_rank()
    history = []
    for rows in global_batches(last)[first:]:
        share = len(rows) // world
        history.append(engine.train_step(rows[mine * share : (mine + 1) * share], learning_rate=3e-4).metrics)
    progress = {"tokens": 17.0, "skipped_samples": {"broken_json": 3}}
    store.save(last, engine.chunks, engine.optimizer, progress, None)
    store.close()
    latest = store.latest()
    platform.parallel.destroy()
    return history, str(latest)


def plain_tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(checkpoint)
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def read_plain(rank, world_size, checkpoint):
    return plain_tensors(checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(distributed, folder):
    """(start, metrics of four steps, checkpoint after two, its tensors) of one rank."""
    _, start = distributed(1, train, ParallelConfig(), folder, None, "start", 0, 0, {})[0]
    history, middle = distributed(1, train, ParallelConfig(), folder, start, "one", 0, 2, {})[0]
    rest, _ = distributed(1, train, ParallelConfig(), folder, middle, "one-rest", 2, 4, {})[0]
    return start, history + rest, middle, distributed(1, read_plain, middle)[0]


@pytest.fixture(scope="module")
def saved(distributed, folder, uninterrupted):
    """The checkpoint after two steps that each layout wrote, made on demand."""
    start, made = uninterrupted[0], {}

    def checkpoint(name: str) -> str:
        if name not in made:
            world_size, parallel = LAYOUTS[name]
            made[name] = distributed(world_size, train, parallel, folder, start, name, 0, 2, {})[0][1]
        return made[name]

    return checkpoint


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_the_same_tensors(distributed, saved, uninterrupted, name):
    expected = uninterrupted[3]
    tensors = distributed(1, read_plain, saved(name))[0]
    assert set(tensors) == set(expected)
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in tensors)
    for key, value in expected.items():
        scale = value.float().abs().max().clamp(min=1e-12)
        assert (tensors[key].float() - value.float()).abs().max() <= 5e-3 * scale, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_goes_on_from_another(distributed, saved, uninterrupted, folder, name):
    names = list(LAYOUTS)
    before = names[names.index(name) - 1]
    world_size, parallel = LAYOUTS[name]
    results = distributed(world_size, train, parallel, folder, saved(before), f"{before}-{name}", 2, 4, {})
    for history, _ in results:
        assert_same(uninterrupted[1][2:], history)


def test_another_architecture_is_refused_by_the_key_that_differs(distributed, saved, folder):
    with pytest.raises(
        Exception, match=r"another architecture: its model.thinker.moe_intermediate_size is 24, .* is 28"
    ):
        changed = {"moe_intermediate_size": 28}
        distributed(2, train, ParallelConfig(tensor=2), folder, saved("TP2"), "other", 2, 3, changed)


def test_a_bf16_run_starts_from_an_fp32_checkpoint(distributed, folder, uninterrupted):
    (history, _), *_ = distributed(1, start_from, ParallelConfig(), uninterrupted[0], {"precision": Precision.bf16})
    assert history[0]["loss"] == pytest.approx(uninterrupted[1][0]["loss"], rel=0.05)


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_a_bf16_run_goes_on_to_the_last_bit(distributed, tmp_path, name):
    """Its fp32 parameters, decays and output norms, are in gradient buffers and optimizer states of their own."""
    world_size, parallel = LAYOUTS[name]
    bf16 = {"precision": Precision.bf16}
    (first, middle), *_ = distributed(world_size, train, parallel, tmp_path, None, "run", 0, 2, bf16)
    (rest, _), *_ = distributed(world_size, train, parallel, tmp_path, middle, "rest", 2, 4, bf16)
    (whole, _), *_ = distributed(world_size, train, parallel, tmp_path, None, "whole", 0, 4, bf16)
    assert first + rest == whole


def start_from(rank, world_size, parallel, start, changes):
    from omni_train import platform
    from omni_train.checkpoint.sharded import load_model
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_recipe(parallel, **changes)
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    load_model(engine.chunks, Path(start), recipe.model)
    engine.optimizer.reload_model_params()
    history = [engine.train_step(rows, learning_rate=3e-4).metrics for rows in global_batches(2)]
    wide = {name for name, parameter in engine.chunks[0].named_parameters() if parameter.dtype is not torch.bfloat16}
    assert wide and all(name.endswith(("A_log", "out_norm.weight")) for name in wide)
    platform.parallel.destroy()
    return history, None


def test_a_path_without_a_complete_checkpoint_is_refused(tmp_path):
    from omni_train.checkpoint.store import resolve

    (tmp_path / "step_00000003.partial").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        resolve(tmp_path)
