"""Streams: the independent, exactly resumable sequences of rows that a run's data is made of.

Every source is cut into ``data.streams`` equal shares of samples, and stream s reads share s of each: each source is
shuffled, read and tokenised by itself, then they are blended by tokens, then packed. Row g of the run (counted over all
data ranks) is the next row of stream g mod ``data.streams``. Which process reads a stream does not matter, so the rows
of a run do not depend on how many data ranks and loader workers there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.energon import SavableDataset
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.wrappers import MapDataset, RepeatDataset, ShuffleBufferDataset
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from omni_train.data.rows.base import Piece, Reading, Row, RowKind
from omni_train.data.rows.kinds import kind_of
from omni_train.data.rows.packing import aligned, best_fit
from omni_train.data.samples.parsing import sample_in
from omni_train.data.samples.sample import SampleError, one_sample
from omni_train.data.samples.sources import ShardFolder, StreamConfig
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.blend import TokenBlend, Tokenized
from omni_train.data.stream.snapshots import read_snapshot, write_snapshot
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, ModelConfig

# A snapshot of a stream's state takes milliseconds, and a restored stream makes the rows since the last one again: long
# rows have a snapshot each.
SNAPSHOT_ROWS = 16
SNAPSHOT_TOKENS = 65536
BUFFER_ROWS = 4
BUFFER_BYTES = 2**30


class Packer(BaseWrapperDataset):
    """Best-fit packing from a buffer of sequences. Unlike energon's, it carries over sequences that did not fit.

    A row is chosen when the buffer holds a row's worth of one of the lengths that bound it, and then
    ``data.packing_buffer`` sequences, ``BUFFER_ROWS`` rows or ``BUFFER_BYTES`` of decoded media, whichever comes first.
    Short sequences fill a row from little more than its own tokens. Where sequences are long it takes a choice of them:
    with lengths drawn log-uniformly from 1k to 32k, rows of 32k are 96 % full from two rows, 99 % from four and hardly
    more from eight. Media are what fills the memory (7 KiB a token, 0.9 GiB in four rows of 32k), so rows of 262k,
    which are long beside most samples, are chosen from little more than one.
    """

    _savable_fields = ("_buffer", "_refused")

    def __init__(self, dataset: SavableDataset, config: DataConfig, kind: RowKind, make_row: Callable[[list], Row]):
        super().__init__(dataset, worker_config=dataset.worker_config)
        self.data, self.kind, self.bounds = config, kind, kind.bounds(config)
        self.make_row = make_row
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._buffer = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)
        self._refused: dict[str, int] = {}  # since the last row

    def __iter__(self) -> Iterator[Row]:
        self._buffer.worker_start()
        source = iter(self.dataset)
        if lost := next((item.refused for item in self._buffer.buffer if item.sequence is None), None):
            raise UserError(
                f"data: a sample that waited to be packed when the checkpoint was written is now refused ({lost}); "
                "resume on the same shards, or start a new run with init_from"
            )
        lengths = [self._lengths(item.sequence) for item in self._buffer.buffer]
        sizes = [item.sequence.media_bytes for item in self._buffer.buffer]
        while True:
            while self._wants_more(lengths, sizes) and (item := next(source, None)) is not None:
                if item.sequence is not None:
                    self._buffer.append(item)
                    lengths.append(self._lengths(item.sequence))
                    sizes.append(item.sequence.media_bytes)
                else:
                    self._refused[item.refused] = self._refused.get(item.refused, 0) + 1
            if not lengths:
                return
            chosen = best_fit(lengths, self.bounds)
            row = self.make_row([self._buffer.buffer[index].sequence for index in chosen])
            for index in sorted(chosen, reverse=True):
                self._buffer.pop(index)
                lengths.pop(index)
                sizes.pop(index)
            row.skipped, self._refused = self._refused, {}
            yield row

    def _wants_more(self, lengths: list[tuple[int, ...]], sizes: list[int]) -> bool:
        filled = [sum(of_all) / bound for of_all, bound in zip(zip(*lengths, strict=True), self.bounds, strict=False)]
        most = max(filled, default=0.0)
        return most < 1 or (
            len(lengths) < self.data.packing_buffer and most < BUFFER_ROWS and sum(sizes) < BUFFER_BYTES
        )

    def _lengths(self, sequence: Piece) -> tuple[int, ...]:
        return tuple(aligned(length, self.data.alignment) for length in self.kind.lengths(sequence, self.data))

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def config(self) -> dict:
        return {"type": type(self).__qualname__, "dataset": self.dataset.config()}


class Epochs(RepeatDataset):
    """Endless repetition; a sample's restore key says how often the samples before it had all been read."""

    def __iter__(self) -> Iterator[Any]:
        for sample in super().__iter__():
            yield add_sample_restore_key(sample, self._repetition, src=self)

    def restore_sample(self, restore_key: tuple) -> Any:
        _, repetition, *inner = restore_key
        return add_sample_restore_key(super().restore_sample(tuple(inner)), repetition, src=self)


def open_stream(
    sources: list[ShardFolder],
    tokenizer: Tokenizer,
    config: DataConfig,
    model: ModelConfig,
    *,
    stream: int,
    streams: int,
    seed: int,
    repeat: bool,
) -> Packer:
    """Stream ``stream`` of ``streams``: shuffled, augmented, endless when ``repeat``; else its share once, in order."""
    worker = StreamConfig(
        rank=stream, world_size=streams, num_workers=1, seed_offset=seed, global_error_handler=reraise_exception
    )
    read = sequence_reader(tokenizer, config, model, seed=seed if repeat else None)
    shares = []
    samples_before = 0
    for source in sources:
        source = copy.copy(source)
        source.worker_config = worker
        share = source.build(worker_rotation_offset=samples_before % streams)
        if repeat:
            share = Epochs(share, worker_config=worker)
            if config.shuffle_buffer > 1:
                share = ShuffleBufferDataset(share, size=config.shuffle_buffer, worker_config=worker)
        shares.append(MapDataset(share, read, stateless_map_fn=True, worker_config=worker))
        samples_before += len(source)
    blend = TokenBlend(shares, config.sources, worker_config=worker)
    kind = kind_of(config.rows)
    return Packer(blend, config, kind, kind.row_maker(tokenizer, config))


def sequence_reader(
    tokenizer: Tokenizer, config: DataConfig, model: ModelConfig, *, seed: int | None = None
) -> Callable[[dict], Iterator[Tokenized]]:
    """Function that makes the sequences of a sample from a source.

    With a ``seed`` samples are augmented as the recipe says. It decides together with the sample's restore key what is
    drawn: every epoch reads something else, and a restored stream the same again.

    Whatever one sample makes fail refuses that sample, as ``one_sample`` says.
    """
    kind, reading = kind_of(config.rows), Reading(tokenizer, config, model, seed)

    def pieces(raw: dict) -> Sequence[Piece]:
        parts = raw["open"]()
        return [] if parts is None else kind.read(sample_in(parts), parts, replace(reading, key=raw["__restore_key__"]))

    def read(raw: dict) -> Iterator[Tokenized]:
        try:
            with one_sample():
                found = pieces(raw)
        except SampleError as error:
            yield Tokenized(raw["__restore_key__"], refused=error.reason)
            return
        for sequence in found:
            yield Tokenized(raw["__restore_key__"], sequence)

    return read


@dataclass
class StreamState:
    """State of a stream: its last snapshot, the rows taken since, and counts of its samples."""

    snapshot: bytes | None = None  # None: from the beginning
    replay: int = 0
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


class StreamReader:
    """Iterator over (row, snapshot or None) of one stream, from ``state`` on.

    Raises:
        UserError: the snapshot in ``state`` cannot be read.
    """

    def __init__(self, stream: Packer, state: StreamState):
        self.stream = stream
        if state.snapshot is not None:
            stream.restore_state(read_snapshot(state.snapshot, stream.save_state()))
        self._iterator = iter(stream)
        self._since_snapshot = 0
        self._snapshot_rows = max(1, min(SNAPSHOT_ROWS, SNAPSHOT_TOKENS // max(stream.bounds)))
        for _ in range(state.replay):
            next(self)

    def __iter__(self) -> StreamReader:
        return self

    def __next__(self) -> tuple[Row, bytes | None]:
        self.stream.worker_config.worker_activate(0)  # energon wants to know who is reading
        try:
            row = next(self._iterator)
        finally:
            self.stream.worker_config.worker_deactivate()
        self._since_snapshot += 1
        if self._since_snapshot < self._snapshot_rows:
            return row, None
        self._since_snapshot = 0
        return row, write_snapshot(self.stream.save_state())
