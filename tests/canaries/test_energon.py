"""What omni_train relies on of energon's insides; that a stream goes on exactly, tests/data shows."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from omni_train.data.samples.sources import StreamConfig
from omni_train.data.stream import snapshots
from omni_train.data.stream.streams import Epochs
from tests.canaries.table import relied_on

SNAPSHOTS, SOURCES = "omni_train/data/stream/snapshots.py", "omni_train/data/samples/sources.py"
STREAMS = "omni_train/data/stream/streams.py"


@dataclass
class Letter:
    text: str
    __restore_key__: tuple


def letters(text: str = "abc"):
    """A dataset of letters, restored by their numbers."""
    from megatron.energon import SavableDataset

    class Letters(SavableDataset):
        _savable_fields = ("at",)

        def reset_state_own(self):
            self.at = 0

        def __iter__(self):
            while self.at < len(text):
                self.at += 1
                yield self.restore_sample((self.at - 1,))
            self.at = 0

        def restore_sample(self, restore_key):
            return Letter(text[restore_key[-1]], ("Letters", restore_key[-1]))

        def len_worker(self, worker_idx=None):
            return len(text)

        def worker_has_samples(self):
            return bool(text)

        def config(self):
            return {}

    dataset = Letters(worker_config=StreamConfig(rank=0, world_size=1, num_workers=1))
    dataset.reset_state_own()
    return dataset


def taken(dataset, count: int) -> list:
    """Its next samples; energon wants to know who is reading."""
    dataset.worker_config.worker_activate(0)
    try:
        return [sample for sample, _ in zip(dataset, range(count), strict=False)]
    finally:
        dataset.worker_config.worker_deactivate()


def test_its_states_have_the_fields_that_we_read():
    from megatron.energon import wrappers
    from megatron.energon.flavors.webdataset.sample_loader import SliceState, WebdatasetSampleLoaderDataset
    from megatron.energon.rng import WorkerRng
    from megatron.energon.wrappers.buffer import SavableSampleBuffer

    kinds = {
        WebdatasetSampleLoaderDataset,
        SavableSampleBuffer,
        WorkerRng,
        wrappers.MapDataset,
        wrappers.RepeatDataset,
        wrappers.ShuffleBufferDataset,
    }
    nested = {"_worker_rng", "_active_buffer"}  # states of their own
    with relied_on("megatron.energon", "its datasets save the fields that a snapshot may have", SNAPSHOTS):
        saved = {name for kind in kinds for name in getattr(kind, "_savable_fields", ())}
        assert saved - nested <= snapshots._FIELDS.keys()
        assert nested <= saved
        assert [field.name for field in fields(SliceState)] == ["index", "current"]


def test_epochs():
    from megatron.energon.wrappers import RepeatDataset

    with relied_on("megatron.energon", "RepeatDataset counts in _repetition how often all samples were read", STREAMS):
        source = letters()
        epochs = Epochs(source, worker_config=source.worker_config)
        samples = taken(epochs, 7)
        assert "".join(sample.text for sample in samples) == "abcabca"
        keys = [sample.__restore_key__ for sample in samples]
        assert keys[2] == ("Epochs", 0, "Letters", 2)
        assert keys[6] == ("Epochs", 2, "Letters", 0)
        assert epochs.restore_sample(keys[5]) == samples[5]
        assert set(RepeatDataset._savable_fields) == {"_repetition", "_index"}


@relied_on(
    "megatron.energon", "a buffer keeps keys of its samples, and makes them again at its worker's start", STREAMS
)
def test_buffers():
    from megatron.energon.wrappers.buffer import SavableSampleBuffer

    source = letters()
    buffer = SavableSampleBuffer(source, worker_config=source.worker_config)
    for sample in taken(source, 3):
        buffer.append(sample)
    assert buffer.pop(0).text == "a"
    state = buffer.save_state()
    other = SavableSampleBuffer(letters(), worker_config=source.worker_config)
    other.restore_state(state)
    assert not other.buffer
    other.worker_start()
    assert other.buffer == buffer.buffer
    assert snapshots.read_snapshot(snapshots.write_snapshot(state), state) == state


@relied_on("megatron.energon", "a pointer to a sample is its shard, where it begins and how long it is", SOURCES)
def test_pointers():
    from megatron.energon.flavors.webdataset.itar import ITarSamplePointer

    assert {field.name for field in fields(ITarSamplePointer)} == {"tar_file_id", "byte_offset", "byte_size"}


@pytest.mark.parametrize(
    ("path", "parts"),
    [("a/b.0.flac", ("a/b", "0.flac")), ("a.json", ("a", "json")), ("__meta__/a.json", None), ("a", None)],
)
def test_names_in_shards(path: str, parts):
    from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

    with relied_on(
        "megatron.energon",
        "a file's name is a key, a dot and the rest; __these__ are skipped",
        "omni_train/data/samples/members.py",
    ):
        found = None if skip_meta_re.match(path) else split_name_re.match(path)
        assert (found and (found[1], found[2])) == parts
