"""A Thinker is known by what its states depend on: not by the layout that wrote it, nor by the layers above them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_train.errors import UserError
from omni_train.frozen.thinker_hash import thinker_hash
from omni_train.recipe.schema import CheckpointConfig, ParallelConfig
from tests.support.thinker import encoders, small_recipe


def rewrite(rank, world_size, folder, parallel, changed):
    """Write checkpoint `start` anew in a layout, or with one of its parameters changed, as the run `changed`."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(parallel, **encoders())
    platform.parallel.initialize(parallel, 31)
    chunks, start = build_chunks(recipe), Path(folder) / "start" / "step_00000000"
    if start.exists():
        load_model(chunks, start, recipe.model)
    for chunk in chunks:
        for name, parameter in chunk.global_parameters():
            if name == changed:
                parameter.data += 1e-3
    name = changed or f"of_{world_size}" if start.exists() else "start"
    store = CheckpointStore(Path(folder) / name, CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, chunks, None, {}, None)
    store.close()
    platform.parallel.destroy()
    return [name for chunk in chunks for name, _ in chunk.global_parameters()]


@pytest.fixture(scope="module")
def folder(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hashes")
    distributed(1, rewrite, folder, ParallelConfig(), None)
    return folder


def hash_of(folder, name="start", layers=2):
    return thinker_hash(str(folder / name / "step_00000000"), layers)


def test_every_layout_writes_the_same_thinker(distributed, folder):
    parallel = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, expert=2)
    distributed(4, rewrite, folder, parallel, None)
    assert hash_of(folder, "of_4") == hash_of(folder)
    assert thinker_hash(hash_of(folder), 1) == hash_of(folder)  # a hash names itself
    assert len({hash_of(folder, layers=layers) for layers in (1, 2, 3)}) == 3


def test_what_the_states_depend_on_changes_it_and_nothing_else_does(distributed, folder):
    names = distributed(1, rewrite, folder, ParallelConfig(), "final_norm.weight")[0]
    above = ["final_norm.weight", "output_layer.weight", next(name for name in names if ".layers.4." in name)]
    below = [next(name for name in names if ".layers.3." in name), "embedding.word_embeddings.weight"]
    below += [next(name for name in names if name.startswith(part)) for part in ("audio_adapter", "vision_encoder")]
    for name in [*above[1:], *below]:
        distributed(1, rewrite, folder, ParallelConfig(), name)
    for name in above:
        assert hash_of(folder, name) == hash_of(folder), name
    assert len({hash_of(folder, name) for name in ["start", *below]}) == 1 + len(below)


def test_tensors_are_read_one_by_one(folder):
    read = []
    thinker_hash(str(folder / "start"), 1, lambda: read.append(1))
    whole = []
    thinker_hash(str(folder / "start"), 4, lambda: whole.append(1))
    assert 20 < len(read) < len(whole)


def test_a_checkpoint_without_a_thinker_is_refused(folder, tmp_path):
    from omni_train.checkpoint.sharded import described

    place = tmp_path / "step_00000000"
    place.mkdir()
    (place / "metadata.json").write_text("{}")
    model = small_recipe(**encoders()).model
    torch.save(described(replace(model, thinker=None)), place / "model.pt")
    with pytest.raises(UserError, match="no Thinker; give a checkpoint of network=thinker"):
        thinker_hash(str(place), 1)
