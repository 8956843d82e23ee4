"""A checkpoint of the Talker does not know the layout that wrote it, and a run goes on from it exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_train.recipe.schema import ParallelConfig, States, TextEmbedding
from tests.distributed.test_checkpoints import read_plain
from tests.distributed.test_layouts import assert_same
from tests.distributed.test_talker_layouts import LAYOUTS
from tests.support.talker import small_talker, speech_batches


def train(rank, world_size, parallel, folder, load, save, first, last):
    """Steps `first` to `last` on stored states from the checkpoint `load`, then save under `save`."""
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_talker(parallel, states=States.stored, text_embedding=TextEmbedding.own)
    recipe.checkpoint.asynchronous = first == 0
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    store = engine.open_store(Path(folder) / save)
    if load is not None:
        assert engine.resume(store, Path(load)) == {"tokens": 17.0}
    world, mine = platform.parallel.data_world_size(), platform.parallel.data_rank()
    history = []
    for step, rows in list(enumerate(speech_batches(last, recipe)))[first:]:
        share = len(rows) // world
        for number, row in enumerate(rows):
            generator = torch.Generator().manual_seed(2 * step + number)
            row.states = torch.randn(len(row.context), 48, generator=generator)
        history.append(engine.train_step(rows[mine * share : (mine + 1) * share], 1e-4, step).metrics)
    engine.save(store, last, {"tokens": 17.0}, None)
    store.close()
    latest = store.latest()
    platform.parallel.destroy()
    return history, str(latest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("talker_checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(distributed, folder):
    """(start, metrics of four steps, tensors after two) of one rank."""
    one = ParallelConfig()
    ((_, start),) = distributed(1, train, one, folder, None, "start", 0, 0)
    ((history, middle),) = distributed(1, train, one, folder, start, "one", 0, 2)
    ((rest, _),) = distributed(1, train, one, folder, middle, "one-rest", 2, 4)
    return start, history + rest, distributed(1, read_plain, middle)[0]


@pytest.fixture(scope="module")
def saved(distributed, folder, uninterrupted):
    """(metrics of two steps, checkpoint after them) of each layout, made on demand."""
    made = {}

    def checkpoint(name):
        if name not in made:
            world_size, parallel = LAYOUTS[name]
            made[name] = distributed(world_size, train, parallel, folder, uninterrupted[0], name, 0, 2)[0]
        return made[name]

    return checkpoint


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_the_same_tensors(distributed, saved, uninterrupted, name):
    expected = uninterrupted[2]
    tensors = distributed(1, read_plain, saved(name)[1])[0]
    assert set(tensors) == set(expected)
    for part in ("codec_embedding.weight", "code_predictor.embeddings"):  # of the first stage and of the last
        assert {part, f"optimizer.state.exp_avg_sq.{part}"} <= set(tensors)
    for key, value in expected.items():
        scale = value.float().abs().max().clamp(min=1e-12)
        assert (tensors[key].float() - value.float()).abs().max() <= 5e-3 * scale, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_goes_on_from_another(distributed, saved, uninterrupted, folder, name):
    names = list(LAYOUTS)
    before = names[names.index(name) - 1]
    world_size, parallel = LAYOUTS[name]
    place = f"{name} from {before}"
    for history, _ in distributed(world_size, train, parallel, folder, saved(before)[1], place, 2, 4):
        assert_same(uninterrupted[1][2:], history)


@pytest.mark.parametrize("name", ["TP2-PP2", "PP2-VPP2", "CP2-EP2-ETP2"])
def test_a_layout_goes_on_from_its_own_to_the_last_bit(distributed, saved, uninterrupted, folder, name):
    world_size, parallel = LAYOUTS[name]
    first, middle = saved(name)
    (_, again), *_ = distributed(world_size, train, parallel, folder, middle, f"{name}-again", 2, 2)
    before, after = (distributed(1, read_plain, checkpoint)[0] for checkpoint in (middle, again))
    assert before.keys() == after.keys()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []
    (rest, _), *_ = distributed(world_size, train, parallel, folder, middle, f"{name}-rest", 2, 4)
    (whole, _), *_ = distributed(world_size, train, parallel, folder, uninterrupted[0], f"{name}-whole", 0, 4)
    assert first + rest == whole
