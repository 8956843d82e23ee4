"""Sources: folders of indexed WebDataset shards, opened with errors a person can act on, read without stopping.

A sample passes through shuffling as a pointer into its shard and is read when its turn comes: shuffle buffers hold no
media, and a restored stream reads nothing twice.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import multistorageclient
from megatron.energon import CrudeWebdataset, SavableDataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import ITarSamplePointer
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import FilteredSample

from omni_train.data.samples.files import open_regular
from omni_train.data.samples.members import read_sample
from omni_train.data.samples.parsing import sample_in
from omni_train.data.samples.sample import Sample, SampleError, one_sample
from omni_train.data.workers import note
from omni_train.errors import UserError, first_line
from omni_train.recipe.schema import DataConfig, SourceConfig

LARGEST = 1 << 62  # bytes of a shard
LARGEST_INDEX = 1 << 30  # bytes of a file of the index, which has a line for each shard
SLICE_SAMPLES = 100  # samples read in order before the reader jumps elsewhere in its share


class StreamConfig(WorkerConfig):
    """Stream ``rank`` of ``world_size`` in the place of energon's worker, in whatever process it is read."""

    def rank_worker_id(self) -> int:
        return 0

    def assert_worker(self) -> None:
        pass


class LateReader:
    """Shard reader whose samples hold, instead of their files, a function ``open`` that reads them.

    What cannot be read is then a refused sample, where energon's own reading stops the run.

    Args:
        reader: knows the shards and where each sample lies in them.
        most: bytes of one sample.
        most_text: bytes of its ``key.json``.
    """

    def __init__(self, reader: ShardInfosITarReader, most: int, most_text: int):
        self.reader, self.most, self.most_text = reader, most, most_text
        # The storage client counts and times every access, which costs as much as parsing the shard.
        reader.tar_filepaths = [path.local_path() if path.is_local() else path for path in reader.tar_filepaths]
        self._opened: dict[int, BinaryIO] = {}

    def __getitem__(self, index: int) -> FilteredSample:
        try:
            pointer = self.reader._get_itar_sample_pointer(index)
        except (OSError, ValueError, IndexError, struct.error):
            pointer = None
        key = ("Webdataset", index)
        read = partial(self._read, index, pointer)
        return FilteredSample(__key__=str(index), __shard__="", __restore_key__=key, __sources__=(), open=read)

    def _read(self, index: int, pointer: ITarSamplePointer | None) -> dict[str, bytes]:
        """Bytes of a sample's files by their names in it.

        Raises SampleError with the reason ``unreadable_index``, ``unreadable_shard`` (it has gone, is no file, or its
        disk fails), or one of ``omni_train.data.samples.members``.
        """
        if pointer is None or pointer.byte_offset < 0 or not 0 < pointer.byte_size < LARGEST:
            raise SampleError("unreadable_index")
        path = self.reader.tar_filepaths[pointer.tar_file_id]
        note(f"the last sample that it began is number {index} of its source, in {path}")
        begin, end = pointer.byte_offset, pointer.byte_offset + pointer.byte_size
        try:
            shard = self._shard(pointer.tar_file_id)
            return read_sample(shard, begin, end, most=self.most, most_text=self.most_text)
        except OverflowError:  # no file has such an offset
            raise SampleError("unreadable_index") from None
        except (OSError, ValueError):
            self._opened.pop(pointer.tar_file_id, None)  # it may be there again
            raise SampleError("unreadable_shard") from None

    def _shard(self, number: int) -> BinaryIO:
        """Open shard, kept among the last few."""
        if number not in self._opened:
            path = self.reader.tar_filepaths[number]
            self._opened[number] = open_regular(path) if isinstance(path, Path) else path.open("rb")
            while len(self._opened) > self.reader.itar_cache_size:
                self._opened.pop(next(iter(self._opened))).close()
        return self._opened[number]


class ShardFolder(CrudeWebdataset):
    """Source: a folder of indexed shards, whatever sample type its own configuration names."""

    most, most_text = DataConfig.max_sample_bytes, DataConfig.max_text_bytes

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset:
        dataset = super().build(worker_rotation_offset)
        readers = dataset.dataset.join_readers
        dataset.dataset.join_readers = [LateReader(reader, self.most, self.most_text) for reader in readers]
        return dataset


def open_sources(data: DataConfig, split: str, *, training: bool, look: bool = True) -> list[ShardFolder]:
    """Sources of a recipe, whose samples are bounded as it says; raises UserError as ``open_source``."""
    folders = [open_source(source, split, training=training, look=look) for source in data.sources]
    for folder in folders:
        folder.most, folder.most_text = data.max_sample_bytes, data.max_text_bytes
    return folders


def open_source(source: SourceConfig, split: str, *, training: bool, look: bool = True) -> ShardFolder:
    """Source of a recipe, with its index read.

    Args:
        source: the source in the recipe.
        split: split to read.
        training: whether it is read for training: shuffled and endless.
        look: whether to check that the shards are there, which one process need not do after another.

    Raises:
        UserError: the folder, its index, the split or a shard is missing.
    """
    command = f"energon prepare --non-interactive --split-ratio 9,1,0 --sample-type CrudeWebdataset {source.path}"
    local = None if "://" in source.path else Path(source.path)
    if local is not None and not local.is_dir():
        raise UserError(f"data.sources: no folder {source.path}; correct data.path, or write the shards there first")
    if local is not None and not any((local / ".nv-meta" / name).is_file() for name in (".info.json", ".info.yaml")):
        raise UserError(f"data.sources: {source.path} has no energon index; make one with `{command}`")
    if local is not None:
        _check_index(local / ".nv-meta")
    if not source.weight > 0:
        raise UserError(
            f"data.sources: weight={source.weight} of {source.path} must be above 0; or leave the source out"
        )
    worker = StreamConfig(rank=0, world_size=1, num_workers=1)
    try:
        folder = ShardFolder(
            energon_path(source.path),
            split_part=split,
            training=training,
            worker_config=worker,
            decoder=None,
            max_samples_per_sequence=SLICE_SAMPLES if training else None,
        )
    except Exception as error:  # energon asserts and raises what it happens to meet
        raise UserError(
            f"data.sources: {source.path}: {first_line(error)}; if its index is at fault, `{command}`"
        ) from None
    if local is not None and look:
        present = {file for place in {(local / shard.name).parent for shard in folder.shards} for file in _files(place)}
        for shard in folder.shards:
            for file in (local / shard.name, (local / shard.name).with_suffix(".tar.idx")):
                if file not in present:
                    raise UserError(f"data.sources: {file} is missing but in the index; restore it, or `{command}`")
    return folder


def first_samples(
    folder: ShardFolder, samples: int, refused: Counter[str]
) -> Iterator[tuple[int, Sample, Callable[[], dict[str, bytes]]]]:
    """(number, sample, function that reads its files) of the first ``samples`` samples in shard order.

    Args:
        folder: the source.
        samples: number of samples.
        refused: counter of the samples that cannot be read, by reason.
    """
    (reader,) = folder.build().dataset.join_readers
    for index in range(min(samples, len(folder))):
        read = reader[index]["open"]
        try:
            with one_sample():
                parts = read()
                sample = None if parts is None else sample_in(parts)
        except SampleError as error:
            refused[error.reason] += 1
            continue
        if sample is not None:
            yield index, sample, read


def energon_path(path: str) -> EPath:
    """energon's path of a local path or URL: other URLs than msc:// (s3://, gs://) have an msc:// name there."""
    if "://" in path and not path.startswith(("msc://", "file://")):
        client, inner = multistorageclient.resolve_storage_client(path)
        path = f"msc://{client.profile}/{inner}"
    return EPath(path)


def _check_index(folder: Path) -> None:
    """Refuse an index that could not be read to its end: energon reads its files whole."""
    for file in os.scandir(folder):
        if file.name.endswith((".json", ".yaml")) and not (file.is_file() and file.stat().st_size <= LARGEST_INDEX):
            raise UserError(f"data.sources: {file.path} is no file of at most {LARGEST_INDEX:,} bytes; index it again")


def _files(folder: Path) -> list[Path]:
    """Regular files of a folder; a FIFO among its shards would never open."""
    return [folder / file.name for file in os.scandir(folder) if file.is_file()] if folder.is_dir() else []
