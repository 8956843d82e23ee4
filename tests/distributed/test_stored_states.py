"""Stored states give what the live Thinker does, from the shards to the losses, whatever layout wrote or reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from omni_train.recipe.schema import CheckpointConfig
from tests.data_pipelines.test_codes import contents
from tests.distributed.test_layouts import assert_same
from tests.distributed.test_talker_layouts import LAYOUTS
from tests.support.pool import RankFailed
from tests.support.spoken_shards import spoken_recipe, stored, write_spoken


def save_thinker(rank, world_size, folder, seed=31, parallel=None):
    """Write a Thinker's checkpoint."""
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

    One rank begins with fresh weights, of which the first call writes a checkpoint; other layouts begin with that.
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
    elif world_size > 1:
        load_model(engine.chunks, start, held(recipe))
        engine.optimizer.reload_model_params()
    store.close()
    feed = Feed(recipe)
    count = recipe.schedule.global_batch // platform.parallel.data_world_size()
    history = [engine.train_step(feed.rows(count), learning_rate=1e-4, step=step).metrics for step in range(steps)]
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


@pytest.fixture(scope="module")
def live(distributed, world):
    return distributed(1, train, recipe_of(world))[0]


def states_in(out: Path) -> dict[str, np.ndarray]:
    found = {}
    for shard in sorted(out.rglob("*.tar")):
        with tarfile.open(shard) as tar:
            names = [name for name in tar.getnames() if name.endswith(".states.npy")]
            found |= {name: np.load(io.BytesIO(tar.extractfile(name).read())) for name in names}
    return found


def test_stored_states_train_as_the_live_thinker_does(distributed, world, written, live):
    (found,) = distributed(1, train, stored(recipe_of(world), written))
    for before, after in zip(live, found, strict=True):
        assert before.keys() == after.keys()
        assert after.pop("grad_norm", 0) == pytest.approx(before.get("grad_norm", 0), rel=1e-4)
        assert after == pytest.approx({key: before[key] for key in after}, rel=1e-5)


@pytest.mark.parametrize("name", ["TP2", "CP2", "PP2"])
def test_they_train_alike_in_other_layouts(distributed, world, written, live, name):
    world_size, parallel = LAYOUTS[name]
    for found in distributed(world_size, train, stored(recipe_of(world, parallel), written)):
        assert_same(live[:-1], found[:-1])
        assert found[-1] == pytest.approx(live[-1], rel=1e-4)


@pytest.mark.parametrize("name", ["CP2", "EP2-DP2", "TP2-PP2", "PP2-VPP2"])
def test_every_layout_writes_the_same_states(distributed, world, written, tmp_path, name):
    """With two data ranks one has shards for longer than the other, which works with it on blank rows."""
    world_size, parallel = LAYOUTS[name]
    distributed(world_size, write, recipe_of(world, parallel), tmp_path)
    expected, found = states_in(written), states_in(tmp_path)
    assert expected and expected.keys() == found.keys()
    for key, states in expected.items():
        assert states.dtype == found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], states, rtol=1e-4, atol=1e-5)
    for source in ("talk", "read"):
        assert (written / source / "states.json").read_text() == (tmp_path / source / "states.json").read_text()


def test_a_sample_that_cannot_be_read_keeps_its_files(world, written):
    for shard in (world / "data" / "talk").glob("*.tar"):
        with tarfile.open(shard) as before, tarfile.open(written / "talk" / shard.name) as after:
            names = [name for name in after.getnames() if not name.endswith(".states.npy")]
            assert before.getnames() == names
            for name in names:
                assert before.extractfile(name).read() == after.extractfile(name).read()
    notes = [json.loads(file.read_text()) for file in (written / "talk" / ".stored").glob("*.tar.json")]
    missing = Counter[str]()
    for note in notes:
        missing.update(note["missing"])
    assert missing == {"audio_damaged": 1, "no_speech": 1}
    assert not {"silent.states.npy", "damaged.states.npy"} & states_in(written).keys()


def test_workers_change_no_byte(distributed, world, written, tmp_path):
    recipe = recipe_of(world)
    recipe.data.workers = 2
    distributed(1, write, recipe, tmp_path)
    assert contents(tmp_path) == contents(written)


def test_killed_and_started_again_it_writes_the_same_bytes(world, written, tmp_path):
    """The same command, in a process of its own that is killed behind its first shard."""
    recipe, out = recipe_of(world), tmp_path / "out"
    (tmp_path / "job").write_bytes(pickle.dumps((recipe, out)))
    program = (
        "import pickle, sys; from omni_train.training.states import states_of; "
        "states_of(*pickle.load(open(sys.argv[1], 'rb')))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "job")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums depend on it, and a worker of the pool has one thread
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 100
    while not list(out.rglob("*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {file: file.stat().st_mtime_ns for file in out.rglob(".stored/*.tar.json")}
    assert not list(out.rglob("states.json"))
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert contents(out) == contents(written)
    assert all(file.stat().st_mtime_ns == when for file, when in made.items())


def feed(rank, world_size, recipe):
    """Open the data of a recipe as a run does."""
    from omni_train import platform
    from omni_train.training.feed import Feed

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    try:
        Feed(recipe).close()
    finally:
        platform.parallel.destroy()


def test_states_of_another_thinker_and_codes_of_another_codec_are_refused(distributed, world, written, tmp_path):
    recipe = stored(recipe_of(world), written)
    distributed(1, feed, recipe)
    distributed(1, save_thinker, tmp_path, 32)
    other = replace(recipe.talker_training, thinker=str(tmp_path / "step_00000000"))
    for training in (other, replace(other, thinker="ab" * 32)):
        with pytest.raises(RankFailed, match=r"states in \S+/talk are of another Thinker, \w{12}… and not \w{12}…"):
            distributed(1, feed, replace(recipe, talker_training=training))
    with pytest.raises(RankFailed, match=r"the codes in \S+/talk are of another codec, c0decc0decc0…"):
        distributed(1, feed, replace(recipe, data=replace(recipe.data, codec="ab" * 32)))
    with pytest.raises(RankFailed, match=r"data.sources: \S+/data/talk has no states; make them with"):
        distributed(1, feed, replace(recipe, data=replace(recipe.data, sources=recipe_of(world).data.sources)))
