"""``omni-train data states``: the Thinker's states of each sample's context, in new shards.

Here is what needs no process group: which samples share a pass of the Thinker, and what is written of it.
:mod:`omni_train.training.states` runs the Thinker.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_train.data.rows.batch import SpeechRow
from omni_train.data.rows.packing import aligned, packer
from omni_train.data.rows.speech import STATES
from omni_train.data.rows.stored_states import RECORD
from omni_train.data.samples.sample import describe
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.copying import index_copies, summed
from omni_train.data_pipelines.making import Making, write_json
from omni_train.data_pipelines.shards import add_file
from omni_train.data_pipelines.states.contexts import Read, Reader
from omni_train.recipe.schema import Precision, Recipe

MOST_BYTES = 1 << 28
"""Bytes of samples that wait for the Thinker together; it does not run for more, beyond the one that passed them."""

Work = Generator[list[SpeechRow], Any, None]
"""Work that gives rows of the Thinker and is sent the states (K, H) of each."""


@dataclass(frozen=True)
class Folder:
    """Folder of shards that gets states.

    Attributes:
        data: folder of the shards.
        making: notes of the new one.
        thinker: content hash of the Thinker.
        checkpoint: of the list of digests of its checkpoint, where it has one.
        settings: those of ``settings_of``.
        shards: names of all shards.
    """

    data: Path
    making: Making
    thinker: str
    checkpoint: str | None
    settings: dict[str, Any]
    shards: list[str]

    def claim(self) -> None:
        """Note how the states are made; raises UserError as ``Making.claim``."""
        self.making.claim(
            {"thinker": self.thinker, "data": str(self.data.resolve()), "shards": self.shards} | self.settings
        )

    def finish(self) -> None:
        """Index the shards, copy what belongs to them, and say whose states they have: it is complete."""
        out, records = self.making.out, self.making.records(self.shards)
        index_copies(self.data, out)
        if (codes := self.data / "codec.json").is_file():
            (out / codes.name).write_bytes(codes.read_bytes())
        whose = {shard: record["thinker"] for shard, record in records.items()}
        record = {"thinker": self.thinker, "checkpoint": self.checkpoint, "settings": self.settings, "shards": whose}
        write_json(out / RECORD, record)
        told = summed(records.values(), "written", "missing", "left_out")
        print(
            f"{out}: states of {self.thinker[:12]}… beside {told['written']['samples']:,} samples in "
            f"{len(self.shards):,} shards; without states: {describe(told['missing']) or 'none'}"
            + (f"; left out: {describe(told['left_out'])}" if told["left_out"] else "")
        )


@dataclass
class Batch:
    """Samples that wait for one pass of the Thinker, in the order of their shard."""

    samples: list[Read] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)  # indices of the samples of each row
    room: list[int] = field(default_factory=list)  # tokens that are left in each row
    bytes: int = 0

    def takes(self, sample: Read, row_tokens: int, alignment: int, most_rows: int) -> bool:
        """Add a sample where there is room; False where there is none."""
        if self.bytes > MOST_BYTES:
            return False
        if sample.sequence is not None:
            length = aligned(len(sample.sequence), alignment)
            row = next((index for index, free in enumerate(self.room) if length <= free), len(self.rows))
            if row == most_rows:
                return False
            if row == len(self.rows):
                self.rows.append([])
                self.room.append(row_tokens)
            self.rows[row].append(len(self.samples))
            self.room[row] -= length
        self.samples.append(sample)
        self.bytes += sample.num_bytes
        return True


class StateWriter:
    """Writer of the states of samples beside them.

    Args:
        recipe: of a Talker.
        most_rows: rows that the Thinker takes in one pass.
    """

    def __init__(self, recipe: Recipe, most_rows: int) -> None:
        self.reader = Reader(recipe.data, recipe.model)
        self.data, self.most_rows = recipe.data, most_rows
        self.float16 = recipe.precision is not Precision.fp32
        self._pack = packer(recipe.data, Tokenizer(recipe.data.tokenizer).end_of_text)

    def row(self, samples: Sequence[Read] = ()) -> SpeechRow:
        """Row of the Thinker with the sequences of samples, and the positions in it that are read."""
        sequences = [sample.sequence for sample in samples if sample.sequence is not None]
        packed = self._pack(sequences)
        starts = packed.cu_seqlens[: len(sequences)].tolist()
        context = [start + sample.positions for start, sample in zip(starts, samples, strict=True)]
        context_K = np.concatenate([np.zeros(0, np.int64), *context])
        return SpeechRow(**vars(packed), context=torch.from_numpy(context_K))

    def write(self, shards: Iterable[tuple[Folder, str]]) -> Work:
        """Make shards, one after the other."""
        for folder, shard in shards:
            yield from self._write(folder, shard)

    def _write(self, folder: Folder, shard: str) -> Work:
        """Make one shard and, last, the record that it is complete."""
        missing, left_out, written = Counter[str](), Counter[str](), 0
        partial = folder.making.partial(shard)
        with tarfile.open(partial, "w") as tar:
            for batch in self._batches(folder.data / shard, left_out):
                states = yield from self._states(batch)
                for sample, own in zip(batch.samples, states, strict=True):
                    reason = sample.reason
                    if own is not None:
                        reason = None if np.isfinite(own).all() else "states_not_finite"
                    if own is not None and reason is None:
                        sample.parts[STATES] = self._file(own)
                        written += 1
                    if reason is not None:
                        missing[reason] += 1
                    for name, data in sample.parts.items():
                        add_file(tar, f"{sample.key}.{name}", data)
        os.replace(partial, folder.making.out / shard)
        facts = {"written": {"samples": written}, "missing": missing, "left_out": left_out}
        folder.making.record(shard, {"thinker": folder.thinker} | facts)

    def _states(self, batch: Batch) -> Generator[list[SpeechRow], Any, list[np.ndarray | None]]:
        """States of each sample of a batch, None of one that reads none."""
        found: list[np.ndarray | None] = [None] * len(batch.samples)
        if batch.rows:
            of_rows = yield [self.row([batch.samples[index] for index in row]) for row in batch.rows]
            for row, states in zip(batch.rows, of_rows, strict=True):
                ends = np.cumsum([len(batch.samples[index].positions) for index in row])
                assert len(states) == ends[-1]
                for index, own in zip(row, np.split(states, ends[:-1]), strict=True):
                    found[index] = own
        return found

    def _batches(self, shard: Path, left_out: Counter[str]) -> Iterator[Batch]:
        batch = Batch()
        for sample in self.reader.samples(shard, left_out):
            while not batch.takes(sample, self.data.row_tokens, self.data.alignment, self.most_rows):
                yield batch
                batch = Batch()
        yield batch

    def _file(self, states: np.ndarray) -> bytes:
        """File of states: in float16 where they were bfloat16, whose digits it has, unless one is beyond its range."""
        if self.float16 and np.abs(states).max(initial=0) <= np.finfo(np.float16).max:
            states = states.astype(np.float16)
        buffer = io.BytesIO()
        np.save(buffer, states)
        return buffer.getvalue()
