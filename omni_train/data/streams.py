"""Streams: the independent, exactly resumable sequences of rows that a run's data is made of.

Every source is cut into ``data.streams`` equal shares of samples, and stream s reads share s of each: energon's
readers, blending and shuffling, then tokens, then packing. Row g of the run (counted over all data ranks) is the next
row of stream g mod ``data.streams``. Which process reads a stream does not matter, so the rows of a run do not depend
on how many data ranks and loader workers there are.
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import multistorageclient
from megatron.energon import CrudeWebdataset, SavableDataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.structs import FilteredSample
from megatron.energon.wrappers import BlendDataset, MapDataset, RepeatDataset, ShuffleBufferDataset
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from omni_train.data.batch import PackedBatch
from omni_train.data.chat import TokenSequence, tokenize
from omni_train.data.packing import aligned, best_fit, pack
from omni_train.data.sample import SampleError, parse_sample
from omni_train.data.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, SourceConfig

SLICE_SAMPLES = 100  # samples read in order before the reader jumps elsewhere in its share
HOPELESS_SAMPLES = 1000  # refused one after the other


class StreamConfig(WorkerConfig):
    """energon's notion of who reads: stream ``rank`` of ``world_size``, in whatever process it lives."""

    def rank_worker_id(self) -> int:
        return 0

    def assert_worker(self) -> None:
        pass


class TolerantReader:
    """A shard reader that hands on what it cannot read as a refused sample, where energon's stops the run."""

    def __init__(self, reader):
        self.reader = reader

    def __getitem__(self, index: int) -> FilteredSample | None:
        try:
            sample = self.reader[index]
        except (tarfile.TarError, ValueError, EOFError):
            return self._refused(index, "truncated_shard" if self._past_the_end(index) else "broken_shard")
        except OSError:
            return self._refused(index, "unreadable_shard")
        for tar in self.reader.itar_files_cache.values():
            tar.members.clear()  # tarfile remembers every header it ever read
        return sample

    def _past_the_end(self, index: int) -> bool:
        try:
            pointer = self.reader._get_itar_sample_pointer(index)
            return pointer.byte_offset + pointer.byte_size > self.reader.tar_filepaths[pointer.tar_file_id].size()
        except (OSError, ValueError):
            return False

    @staticmethod
    def _refused(index: int, reason: str) -> FilteredSample:
        key = ("Webdataset", index)
        return FilteredSample(__key__=str(index), __shard__="", __restore_key__=key, __sources__=(), refused=reason)


class ShardFolder(CrudeWebdataset):
    """One source: a folder of indexed shards, whatever sample type its own configuration names."""

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset:
        dataset = super().build(worker_rotation_offset)
        dataset.dataset.join_readers = [TolerantReader(reader) for reader in dataset.dataset.join_readers]
        return dataset


def open_source(source: SourceConfig, split: str, *, training: bool) -> ShardFolder:
    """Read a source's index. Raises UserError when the folder, its index, the split or a shard is missing."""
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
            _energon_path(source.path),
            split_part=split,
            training=training,
            worker_config=worker,
            decoder=None,
            max_samples_per_sequence=SLICE_SAMPLES if training else None,
        )
    except Exception as error:  # energon asserts and raises what it happens to meet
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"data.sources: {source.path}: {line}; if its index is at fault, `{command}`") from None
    if local is not None:
        present = {file for place in {(local / shard.name).parent for shard in folder.shards} for file in _files(place)}
        for shard in folder.shards:
            for file in (local / shard.name, (local / shard.name).with_suffix(".tar.idx")):
                if file not in present:
                    raise UserError(f"data.sources: {file} is missing but in the index; restore it, or `{command}`")
    return folder


def _energon_path(path: str) -> EPath:
    """energon knows local paths and msc://; for other URLs (s3://, gs://) its storage client has an msc:// name."""
    if "://" in path and not path.startswith(("msc://", "file://")):
        client, inner = multistorageclient.resolve_storage_client(path)
        path = f"msc://{client.profile}/{inner}"
    return EPath(path)


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


@dataclass
class Tokenized:
    """A sequence on its way to packing, or the reason why a sample has none."""

    __restore_key__: tuple
    sequence: TokenSequence | None = None
    refused: str | None = None


class Packer(BaseWrapperDataset):
    """Best-fit packing from a buffer of sequences. Unlike energon's, it carries over what did not fit in a row."""

    _savable_fields = ("_buffer", "_refused")

    def __init__(self, dataset: SavableDataset, config: DataConfig, padding_token: int):
        super().__init__(dataset, worker_config=dataset.worker_config)
        self.data = config
        self.padding_token = padding_token
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._buffer = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)
        self._refused: dict[str, int] = {}  # since the last row

    def __iter__(self) -> Iterator[PackedBatch]:
        self._buffer.worker_start()
        source = iter(self.dataset)
        lengths = [self._aligned(item) for item in self._buffer.buffer]
        while True:
            # A row is chosen from `packing_buffer` sequences, or from as many as it takes to fill two rows.
            while len(lengths) < self.data.packing_buffer or sum(lengths) < 2 * self.data.row_tokens:
                item = next(source, None)
                if item is None:
                    break
                if item.refused is None:
                    self._buffer.append(item)
                    lengths.append(self._aligned(item))
                else:
                    self._count(item.refused)
            if not lengths:
                return
            chosen = best_fit(lengths, self.data.row_tokens)
            row = pack(
                [self._buffer.buffer[index].sequence for index in chosen],
                row_tokens=self.data.row_tokens,
                alignment=self.data.alignment,
                padding_token=self.padding_token,
            )
            for index in sorted(chosen, reverse=True):
                self._buffer.pop(index)
                lengths.pop(index)
            row.skipped, self._refused = self._refused, {}
            yield row

    def _aligned(self, item: Tokenized) -> int:
        return aligned(len(item.sequence), self.data.alignment)

    def _count(self, reason: str) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + 1
        if sum(self._refused.values()) >= HOPELESS_SAMPLES:
            raise UserError(
                f"data.sources: {HOPELESS_SAMPLES:,} samples in a row were refused ({describe(self._refused)}); "
                "mend the shards, or leave the source out"
            )

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


def describe(refused: dict[str, int]) -> str:
    """Reasons and counts in words, the commonest first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(refused.items(), key=lambda item: -item[1]))


def open_stream(
    sources: list[ShardFolder],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    stream: int,
    streams: int,
    seed: int,
    repeat: bool,
) -> Packer:
    """Stream ``stream`` of ``streams``: shuffled and endless when ``repeat``, else its share once, in order."""
    worker = StreamConfig(
        rank=stream, world_size=streams, num_workers=1, seed_offset=seed, global_error_handler=reraise_exception
    )

    def read(raw: dict) -> Iterator[Tokenized]:
        try:
            if "refused" in raw:
                raise SampleError(raw["refused"])
            if "json" not in raw:
                raise SampleError("no_json")
            sequences = tokenize(
                parse_sample(raw["json"]), tokenizer, row_tokens=config.row_tokens, loss_on=config.loss_on
            )
        except SampleError as error:
            yield Tokenized(raw["__restore_key__"], refused=error.reason)
            return
        for sequence in sequences:
            yield Tokenized(raw["__restore_key__"], sequence)

    shares = []
    samples_before = 0
    for source in sources:
        source = copy.copy(source)
        source.worker_config = worker
        share = source.build(worker_rotation_offset=samples_before % streams)
        shares.append(RepeatDataset(share, worker_config=worker) if repeat else share)
        samples_before += len(source)
    dataset = shares[0]
    if len(shares) > 1:
        weights = [source.weight for source in config.sources]
        dataset = BlendDataset(*zip(shares, weights, strict=True), worker_config=worker)
    if repeat and config.shuffle_buffer > 1:
        dataset = ShuffleBufferDataset(dataset, size=config.shuffle_buffer, worker_config=worker)
    dataset = MapDataset(dataset, read, stateless_map_fn=True, worker_config=worker)
    return Packer(dataset, config, tokenizer.end_of_text)
