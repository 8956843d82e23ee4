"""Sources: folders of indexed WebDataset shards, opened with errors a person can act on, read without stopping.

A sample passes through shuffling as a pointer into its shard and is read when its turn comes: shuffle buffers hold no
media, and a restored stream reads nothing twice.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import multistorageclient
from megatron.energon import CrudeWebdataset, SavableDataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import ITarSamplePointer
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import FilteredSample

from omni_train.data.sample import Sample, SampleError, one_sample, sample_in
from omni_train.data.workers import note
from omni_train.errors import UserError, first_line
from omni_train.recipe.schema import SourceConfig

SLICE_SAMPLES = 100  # samples read in order before the reader jumps elsewhere in its share


class StreamConfig(WorkerConfig):
    """energon's notion of who reads: stream ``rank`` of ``world_size``, in whatever process it lives."""

    def rank_worker_id(self) -> int:
        return 0

    def assert_worker(self) -> None:
        pass


class LateReader:
    """A shard reader whose samples hold, instead of their files, the function ``open`` that reads them.

    What cannot be read is then a refused sample, where energon's own reading stops the run.
    """

    def __init__(self, reader: ShardInfosITarReader):
        self.reader = reader
        # The storage client counts and times every access, which costs as much as parsing the shard.
        reader.tar_filepaths = [path.local_path() if path.is_local() else path for path in reader.tar_filepaths]

    def __getitem__(self, index: int) -> FilteredSample:
        try:
            pointer = self.reader._get_itar_sample_pointer(index)
        except (OSError, ValueError, IndexError):
            pointer = None
        key = ("Webdataset", index)
        read = partial(self._read, index, pointer)
        return FilteredSample(__key__=str(index), __shard__="", __restore_key__=key, __sources__=(), open=read)

    def _read(self, index: int, pointer: ITarSamplePointer | None) -> dict[str, bytes] | None:
        """The files of a sample by their extensions; None for a sample that the index excludes.

        Raises SampleError with the reason ``unreadable_index``, ``unreadable_shard`` (it has gone, or its disk fails),
        ``truncated_shard``, or ``broken_shard``.
        """
        if pointer is None:
            raise SampleError("unreadable_index")
        shard = self.reader.tar_filepaths[pointer.tar_file_id]
        note(f"the last sample that it began is number {index} of its source, in {shard}")
        try:
            sample = self.reader._get_item_by_sample_pointer(pointer, index)
        except (tarfile.TarError, ValueError, EOFError):
            raise SampleError("truncated_shard" if self._past_the_end(pointer) else "broken_shard") from None
        except OSError:
            raise SampleError("unreadable_shard") from None
        for tar in self.reader.itar_files_cache.values():
            tar.members.clear()  # tarfile remembers every header it ever read
        return sample and {name: data for name, data in sample.items() if not name.startswith("__")}

    def _past_the_end(self, pointer: ITarSamplePointer) -> bool:
        try:
            path = self.reader.tar_filepaths[pointer.tar_file_id]
            size = path.stat().st_size if isinstance(path, Path) else path.size()
            return pointer.byte_offset + pointer.byte_size > size
        except OSError:
            return False


class ShardFolder(CrudeWebdataset):
    """One source: a folder of indexed shards, whatever sample type its own configuration names."""

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset:
        dataset = super().build(worker_rotation_offset)
        dataset.dataset.join_readers = [LateReader(reader) for reader in dataset.dataset.join_readers]
        return dataset


def open_source(source: SourceConfig, split: str, *, training: bool, look: bool = True) -> ShardFolder:
    """Read a source's index.

    Args:
        look: whether the shards are there; not again in every process that opens what another has looked at.

    Raises:
        UserError: the folder, its index, the split or a shard is missing.
    """
    command = f"energon prepare --non-interactive --split-ratio 9,1,0 --sample-type CrudeWebdataset {source.path}"
    local = None if "://" in source.path else Path(source.path)
    if local is not None and not local.is_dir():
        raise UserError(f"data.sources: no folder {source.path}; correct data.path, or write the shards there first")
    if local is not None and not any((local / ".nv-meta" / name).is_file() for name in (".info.json", ".info.yaml")):
        raise UserError(f"data.sources: {source.path} has no energon index; make one with `{command}`")
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
    """(number, sample, what reads its files) of the first ``samples`` in shard order.

    Args:
        refused: counts those that cannot be read, by reason.
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
    """energon knows local paths and msc://; for other URLs (s3://, gs://) its storage client has an msc:// name."""
    if "://" in path and not path.startswith(("msc://", "file://")):
        client, inner = multistorageclient.resolve_storage_client(path)
        path = f"msc://{client.profile}/{inner}"
    return EPath(path)


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
