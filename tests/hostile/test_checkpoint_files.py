"""Checkpoints of somebody else: nothing that their files call is run, whichever way they are read."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from omni_train.checkpoint.integrity import write_digests
from omni_train.checkpoint.plain import read_network, whole_tensors
from omni_train.checkpoint.sharded import read_model_config, read_progress
from omni_train.checkpoint.store import Store
from omni_train.checkpoint.zero import _read_share
from omni_train.errors import UserError
from omni_train.recipe.schema import CheckpointConfig, ParallelConfig
from tests.support.hostile import CALLS, torch_file
from tests.support.pool import RankFailed
from tests.support.thinker import small_recipe
from tests.training.engines.test_zero import train, zero_of

TENSOR, OBJECT = "embedding.weight", "output_layer._extra_state"


def test_the_calls_are_made_where_pickle_reads_them(call, mark):
    torch.load(torch_file(mark.with_name("file"), [call]), weights_only=False)
    assert mark.exists()


def test_loader_states(call, refused, tmp_path):
    torch_file(tmp_path / "loader_00000.pt", {"world_size": 1, "rows": call})
    refused(Store.loader_states, tmp_path, match=r"loader_00000\.pt: holds (posix\.system|exec), which no checkpoint")


def test_the_description_of_the_model(call, refused, tmp_path):
    torch_file(tmp_path / "model.pt", {"name": "small", "layers": call})
    refused(read_model_config, tmp_path, match=r"model\.pt: holds (posix\.system|exec), which no checkpoint")


@pytest.mark.parametrize(
    "state", [np.zeros(3, np.uint32), {1, 2}, torch.nn.Parameter(torch.zeros(1)), SimpleNamespace()], ids=type
)
def test_what_is_no_plain_state(refused, tmp_path, state):
    import megatron.core  # noqa: F401  which registers arrays and namespaces with torch.load

    torch_file(tmp_path / "model.pt", {"name": "small", "layers": state})
    refused(read_model_config, tmp_path, match=r"model\.pt: holds (a |numpy|types)")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["module", "optimizer_state_dict"])
def test_a_share_of_deepspeed(call, refused, tmp_path, place, zipped):
    share = torch_file(tmp_path / "mp_rank_00_model_states.pt", {"module": {}} | {place: {"x": call}}, zipped)
    refused(_read_share, str(share), match=r"model_states\.pt: holds (posix\.system|exec)")


def test_states_of_layers_that_transformer_engine_would_unpickle(call, refused, tmp_path):
    state = torch.frombuffer(bytearray(pickle.dumps(call)), dtype=torch.uint8)
    save_file({f"encoder.{OBJECT}": state}, tmp_path / "model.safetensors")
    refused(read_network, tmp_path, "model", match=r"model\.safetensors: holds something in encoder\.output_layer")
    refused(whole_tensors, tmp_path, match=r"model\.safetensors: holds something in encoder\.output_layer")
    share = torch_file(tmp_path / "share.pt", {"module": {OBJECT: state}})
    refused(_read_share, str(share), match=r"share\.pt: holds something in output_layer\._extra_state")
    save_file({OBJECT: torch.empty(0, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert read_network(tmp_path, "model").keys() == {OBJECT}


def small_state():
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    weight = torch.arange(6.0).view(2, 3)
    return {
        "model": {
            TENSOR: ShardedTensor.from_rank_offsets(TENSOR, weight),
            OBJECT: ShardedObject(OBJECT, torch.empty(0, dtype=torch.uint8), (1,), (0,)),
        }
    }


def write(rank, world_size, folder):
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore

    platform.parallel.initialize(ParallelConfig(), 1)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), small_recipe().model)
    store.save(0, [], None, {"tokens": 3.0}, None, state=small_state())
    store.close()
    platform.parallel.destroy()
    return str(store.latest())


@pytest.fixture(scope="module")
def genuine(distributed, tmp_path_factory) -> Path:
    return Path(distributed(1, write, tmp_path_factory.mktemp("genuine"))[0])


@pytest.fixture
def checkpoint(genuine, tmp_path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(genuine, tmp_path / "checkpoint"))


def resume(rank, world_size, checkpoint):
    from omni_train import platform
    from omni_train.checkpoint.sharded import load_sharded

    platform.parallel.initialize(ParallelConfig(), 1)
    try:
        return load_sharded(small_state(), checkpoint)
    finally:
        platform.parallel.destroy()


def start(rank, world_size, checkpoint):
    from omni_train import platform
    from omni_train.checkpoint.start import _check_tensors

    platform.parallel.initialize(ParallelConfig(), 1)
    try:
        _check_tensors(small_state(), checkpoint)
    finally:
        platform.parallel.destroy()


def export(checkpoint):
    from omni_train.checkpoint.reader import CheckpointReader

    return CheckpointReader(checkpoint).read(TENSOR)


@pytest.fixture
def in_a_rank(distributed):
    """in_a_rank(read)(checkpoint) reads it with process groups."""

    def reader(read):
        def call(*arguments):
            try:
                return distributed(1, read, *arguments)[0]
            except RankFailed as error:
                told = re.findall(r"^omni_train\S+\.(?:UserError|DamagedCheckpoint): .*", str(error), re.MULTILINE)
                raise (UserError(told[-1]) if told else error) from error

        return call

    return reader


@pytest.fixture
def ways(in_a_rank):
    """Every way in which the files of a sharded checkpoint are read."""
    return {"resume": in_a_rank(resume), "start": in_a_rank(start), "progress": read_progress, "export": export}


def test_a_genuine_checkpoint_is_read_in_every_way(genuine, ways):
    state = ways["resume"](genuine)
    assert state["progress"] == {"tokens": 3.0} and torch.equal(state["model"][TENSOR], torch.arange(6.0).view(2, 3))
    ways["start"](genuine)
    assert ways["progress"](genuine) == {"tokens": 3.0}
    assert torch.equal(ways["export"](genuine), torch.arange(6.0).view(2, 3))


def genuine_metadata(checkpoint: Path):
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def put(checkpoint: Path, key: str, state) -> None:
    """Put an item of one's own in the place of the one that the checkpoint has of that name."""
    metadata, file = genuine_metadata(checkpoint), checkpoint / "__0_0.distcp"
    (place,) = [place for index, place in metadata.storage_data.items() if index.fqn.startswith(key)]
    item = torch_file(checkpoint / "item", state)
    place.offset, place.length = file.stat().st_size, item.stat().st_size
    with file.open("ab") as shard:
        shard.write(item.read_bytes())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("way", ["resume", "start", "progress", "export"])
def test_metadata(call, refused, checkpoint, ways, way):
    metadata = genuine_metadata(checkpoint)
    metadata.planner_data = call
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(ways[way], checkpoint, match=r"/\.metadata: holds (posix\.system|builtins\.exec), which no checkpoint")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda metadata: metadata.storage_data.popitem()[1].__setattr__("length", -1),
        lambda metadata: next(iter(metadata.storage_data.values())).__setattr__(
            "relative_path", "../../loader_00000.pt"
        ),
        lambda metadata: metadata.state_dict_metadata.__setitem__(TENSOR, metadata.storage_meta),
        lambda metadata: metadata.__setattr__("storage_data", [1]),
    ],
    ids=["place", "path", "entry", "list"],
)
def test_metadata_of_another_shape(refused, checkpoint, ways, spoil):
    metadata = genuine_metadata(checkpoint)
    spoil(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(ways["resume"], checkpoint, match=r"cannot be read")


def test_metadata_cannot_change_a_class(refused, checkpoint, ways):
    """A pickle may set the attributes of whatever it names, of classes too."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    state = b"}X\x05\x00\x00\x00chunkK\x01s"
    name = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
    (checkpoint / ".metadata").write_bytes(b"\x80\x02" + name + b"N" + state + b"\x86b.")
    refused(ways["progress"], checkpoint, match=r"\.metadata cannot be read")
    assert not hasattr(TensorStorageMetadata, "chunk")


@pytest.mark.parametrize(("key", "way"), [("common_state", "progress"), ("common_state", "resume"), (OBJECT, "resume")])
def test_objects_in_a_shard(call, refused, checkpoint, ways, key, way):
    put(checkpoint, key, [call])
    refused(ways[way], checkpoint, match=rf"its {key}\S* ?: ?holds (posix\.system|exec), which|: its {key}")


def test_the_state_of_a_layer_in_a_shard(call, refused, checkpoint, ways):
    put(checkpoint, OBJECT, [torch.frombuffer(bytearray(pickle.dumps(call)), dtype=torch.uint8)])
    refused(ways["resume"], checkpoint, match=rf"holds something in {OBJECT}")


@pytest.mark.parametrize("way", ["resume", "export"])
@pytest.mark.parametrize("state", [CALLS["system"], lambda mark: np.zeros((2, 3), np.uint32)], ids=["call", "numpy"])
def test_tensors_in_a_shard(mark, refused, checkpoint, ways, way, state):
    put(checkpoint, TENSOR, state(mark))
    refused(ways[way], checkpoint, match=r"holds (posix\.system|numpy\S+), which no checkpoint")


def test_the_common_state_of_an_older_megatron(call, refused, checkpoint, ways):
    torch_file(checkpoint / "common.pt", {"progress": call})
    for way in ("resume", "progress", "start"):
        refused(ways[way], checkpoint, match=r"common\.pt: no checkpoint of omni_train has this file")


def test_random_states(call, refused, in_a_rank, checkpoint):
    torch_file(checkpoint / "random_00000.pt", {"python": call, "tracker": {}})
    refused(in_a_rank(load_run), checkpoint, match=r"random_00000\.pt: holds (posix\.system|exec)")


def test_what_deepspeed_resumes_from(mark, refused, in_a_rank, tmp_path):
    """Its names of files are patterns of a shell, which match more than what it wrote, or nothing."""
    run = tmp_path / "run[1]"
    resumed = in_a_rank(train)
    resumed(zero_of(1), run, 1, [1])
    resumed(zero_of(1), run, 1, [])
    step = run / "step_00000001"
    shares, random = step / "zero" / "maker", step / "random_00000.pt"
    genuine = {file: file.read_bytes() for file in [*shares.iterdir(), random]}
    assert len(genuine) == 3
    for file, content in genuine.items():
        torch_file(file, {"module": {}, "tracker": {}, "python": CALLS["exec"](mark)})
        write_digests(step)
        refused(resumed, zero_of(1), run, 1, [], match=rf"{file.name}: holds exec, which")
        file.write_bytes(content)
    torch_file(shares / "mp_rank_!_model_states.pt", {"module": {}, "x": CALLS["exec"](mark)})
    write_digests(step)
    resumed(zero_of(1), run, 1, [])
    assert not mark.exists()


def load_run(rank, world_size, checkpoint):
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore

    platform.parallel.initialize(ParallelConfig(), 1)
    try:
        store = CheckpointStore(checkpoint.parent / "run", CheckpointConfig(), small_recipe().model)
        store.load(
            checkpoint.rename(checkpoint.with_name("step_00000000")), [], SimpleNamespace(reload_model_params=int)
        )
    finally:
        platform.parallel.destroy()
