"""Contexts of the samples of a shard: what the Thinker reads of each, and where its states are taken."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from omni_train.data import transfer
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import STATES, before_and_text, planner_of
from omni_train.data.rows.speech_context import Context, context_positions
from omni_train.data.rows.speech_plans import Planner
from omni_train.data.samples.parsing import sample_in
from omni_train.data.samples.sample import SampleError, one_sample
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.workers import Worker, end, note
from omni_train.data_pipelines.copying import Parts, readers_of
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, ModelConfig

AHEAD = 2  # samples that a worker sends before they are taken


@dataclass
class Read:
    """Sample of a shard.

    Attributes:
        key: its key.
        parts: its files by their names.
        reason: why it has no context, where it cannot be read.
        sequence: the Thinker's, None where no state is read.
        positions: (K,) in it, of the states that are read.
    """

    key: str
    parts: Parts
    reason: str | None = None
    sequence: TokenSequence | None = None
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_bytes(self) -> int:
        """Memory of its files and of its decoded media, in bytes."""
        media = 0 if self.sequence is None else self.sequence.media_bytes
        return media + sum(map(len, self.parts.values()))


@dataclass
class Reader:
    """Reader of shards with the settings of a recipe, which is pickled to other processes as these."""

    data: DataConfig
    model: ModelConfig

    @cached_property
    def planner(self) -> Planner:
        return planner_of(Tokenizer(self.data.tokenizer), self.data, self.model)

    def samples(self, shard: Path, left_out: Counter[str]) -> Iterator[Read]:
        """Samples of a shard in order, read by ``data.workers`` processes or here.

        Args:
            shard: path of the tar.
            left_out: counter of the samples that training would refuse for their files, by reason.

        Raises:
            UserError: the shard breaks off, or a process dies over a sample.
        """
        for found in self._from_workers(shard) if self.data.workers else self.share(shard, 0, 1):
            if isinstance(found, str):
                left_out[found] += 1
            else:
                yield found

    def share(self, shard: Path, number: int, ways: int) -> Iterator[Read | str]:
        """Every ``ways``-th sample of a shard, from ``number`` on, or the reason why it is left out."""
        limits = self.data.max_sample_bytes, self.data.max_text_bytes
        keys = readers_of(shard, *limits, {STATES})
        for key, read in itertools.islice(keys, number, None, ways):
            note(f"{key} in {shard}")
            try:
                parts = read()
            except SampleError as error:
                yield error.reason
                continue
            yield self.read(key, parts)

    def _from_workers(self, shard: Path) -> Iterator[Read | str]:
        workers = [Worker(_work, self, shard, number) for number in range(self.data.workers)]
        try:
            for worker in itertools.cycle(workers):  # sample n comes from worker n mod data.workers
                try:
                    found = pickle.loads(worker.receive())
                except EOFError:
                    raise UserError(
                        f"{shard}: a process died ({worker.note}); take that sample out if it is the same each time, "
                        "or give the job more memory; the same command goes on from here"
                    ) from None
                if isinstance(found, UserError):
                    raise found
                if found is None:
                    return
                yield found
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has sent all of its share
                    worker.end.send(b".")
        finally:
            end(workers)

    def read(self, key: str, parts: Parts) -> Read:
        """Sample of these files, with its context."""
        try:
            with one_sample():
                context = self._context(parts)
        except SampleError as error:
            return Read(key, parts, error.reason)
        return Read(key, parts, None, context.sequence, context.positions)

    def _context(self, parts: Parts) -> Context:
        sample = sample_in(parts)
        if sample.speech is None:
            raise SampleError("no_speech")
        before, _ = before_and_text(sample, self.data.chat_template)
        return context_positions(before, self.planner, self.data, self.model, parts)


def _work(channel: socket.socket, reader: Reader, shard: Path, number: int) -> None:
    """Run a worker: send what ``Reader.share`` gives, ``AHEAD`` of what was taken, then None or the error that ends it.

    What is sent is pickled as one, since a sample may have more arrays than a message may hold.
    """
    torch.set_num_threads(1)
    try:
        for count, found in enumerate(reader.share(shard, number, reader.data.workers)):
            if count >= AHEAD and not channel.recv(1):
                return
            transfer.send(channel, pickle.dumps(found))
        last = None
    except UserError as error:
        last = error
    transfer.send(channel, pickle.dumps(last))
