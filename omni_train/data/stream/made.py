"""Making of rows from streams, in the process that takes them or in a worker that makes them ahead."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import socket
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from omni_train.data import transfer
from omni_train.data.rows.base import Row
from omni_train.data.samples.sources import ShardFolder, open_sources
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.streams import StreamReader, StreamState, open_stream
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, ModelConfig

OPEN_FILES = 65536  # a stream keeps 16 shards of each source open with their indices

Made = tuple[int, Row | UserError, bytes | None]
"""(stream, its next row or the error in its place, state of the stream after it where that was recorded)."""


@dataclasses.dataclass
class Rows:
    """Maker of the rows of a recipe's endless streams. It is pickled to a worker as settings, and opens files there."""

    config: DataConfig
    model: ModelConfig
    split: str
    seed: int
    samples: list[int] | None = None  # of each source, since its files were looked for

    def open(self) -> None:
        """Open the tokenizer and the sources of all streams.

        Raises:
            UserError: the tokenizer or a source is not usable.
        """
        _ = self.tokenizer, self.sources

    @cached_property
    def sources(self) -> list[ShardFolder]:
        look = self.samples is None
        sources = open_sources(self.config, self.split, training=True, look=look)
        samples = [len(source) for source in sources]
        if self.samples not in (None, samples):
            raise UserError(
                f"data.sources: an index was changed while the run reads it: samples per source were {self.samples}, "
                f"now {samples}; restore it, or start a new run with init_from"
            )
        self.samples = samples
        return sources

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.config.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}

    def made(self, states: dict[int, StreamState], first: int) -> Iterator[Made]:
        """Rows from row ``first`` on, where row n is the next one of the n-th of ``states``, over and over."""
        streams = list(states)
        readers: dict[int, StreamReader] = {}
        for number in itertools.count(first):
            stream = streams[number % len(streams)]
            try:
                if stream not in readers:
                    readers[stream] = self._reader(stream, states[stream])
                yield stream, *next(readers[stream])
            except UserError as error:
                yield stream, error, None
                return

    def _reader(self, stream: int, state: StreamState) -> StreamReader:
        sources, tokenizer, config, model = self.sources, self.tokenizer, self.config, self.model
        opened = open_stream(
            sources, tokenizer, config, model, stream=stream, streams=config.streams, seed=self.seed, repeat=True
        )
        return StreamReader(opened, state)


def work(end: socket.socket, rows: Rows, states: dict[int, StreamState], first: int) -> None:
    """Run a worker: make the rows of ``Rows.made``, one for every byte that comes, until the other end closes."""
    torch.set_num_threads(1)
    allow_open_files()
    made = rows.made(states, first)
    while end.recv(1) and (item := next(made, None)) is not None:
        transfer.send(end, item)


def allow_open_files() -> None:
    """Let this process, and those that it starts, open as many files as streams need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
