"""Loader of a data rank's rows, from worker processes, restored exactly on any number of ranks and workers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import signal
import sys
from collections.abc import Iterator
from typing import Any

from omni_train.data.rows.base import Row
from omni_train.data.rows.codes import check_codes
from omni_train.data.samples.sample import describe
from omni_train.data.samples.sources import open_sources
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.made import Made, Rows, allow_open_files, work
from omni_train.data.stream.states import check_state
from omni_train.data.stream.streams import StreamReader, StreamState, open_stream
from omni_train.data.workers import Worker, end, start_server
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, ModelConfig

SKIP_GRACE = 1000  # samples before the skip limit applies
AHEAD = 2  # rows that a worker makes before they are taken
MOST_DEATHS = 3  # of workers without a row in between: what is chance is over by then, and what a sample does is not


class Loader:
    """Endless iterator over the rows of one data rank; ``state_dict`` is its state after the rows taken so far."""

    def __init__(self, rows: Rows, data_rank: int, data_world_size: int):
        self.config = rows.config
        self.source_samples = [len(source) for source in rows.sources]
        self.data_rank, self.world_size = data_rank, data_world_size
        self._source = rows
        self._states = {s: StreamState() for s in range(data_rank, self.config.streams, data_world_size)}
        self._rows = 0  # taken on this rank
        self._iterator: Iterator[Made] | None = None  # where there are no workers
        self._workers: dict[int, Worker] = {}  # row n on this rank comes from worker n mod data.workers
        self._deaths = 0  # of workers, since the last row

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Row:
        """Next row.

        Raises:
            UserError: more than ``data.max_skip_fraction`` of the samples were refused, or workers die again and again.
        """
        stream, row, snapshot = self._from_a_worker() if self.config.workers else self._made_here()
        if isinstance(row, UserError):
            self.close()
            raise row
        self._rows += 1
        state = self._states[stream]
        state.replay += 1
        if snapshot is not None:
            state.snapshot, state.replay = snapshot, 0
        state.seen += row.samples + sum(row.skipped.values())
        for reason, count in row.skipped.items():
            state.skipped[reason] = state.skipped.get(reason, 0) + count
        if row.skipped:
            self._check_skipped()
        return row

    def state_dict(self) -> dict[str, Any]:
        """State after the last row, mid-pack included, in plain containers, numbers and bytes."""
        return {
            "world_size": self.world_size,
            "rows": self._rows,
            "source_samples": list(self.source_samples),
            "streams": {stream: copy.deepcopy(vars(state)) for stream, state in self._states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the rows of ``state``, with any number of workers.

        A state of another number of data ranks must go through ``redistribute`` first. Its snapshot of a stream is read
        with that stream's next row.

        Raises:
            UserError: the state is of other data, another number of streams or another layout of data ranks, or is no
                such state at all.
        """
        check_state(state)
        if state["source_samples"] != self.source_samples:
            raise UserError(
                f"data.sources: samples per source are {self.source_samples}, in the checkpoint "
                f"{state['source_samples']}; resume on the same shards, or start a new run with init_from"
            )
        if list(state["streams"]) != list(self._states):
            raise UserError(
                f"data.streams={self.config.streams} over {self.world_size} data ranks is not the checkpoint's "
                f"{len(state['streams']) * state['world_size']} over {state['world_size']}; keep data.streams"
            )
        self.close()
        self._rows = state["rows"]
        self._states = {stream: StreamState(**copy.deepcopy(saved)) for stream, saved in state["streams"].items()}

    def close(self) -> None:
        """End the worker processes."""
        self._iterator = None
        end(self._workers.values())
        self._workers.clear()

    def _made_here(self) -> Made:
        if self._iterator is None:
            self._iterator = self._source.made(copy.deepcopy(self._states), self._rows)
        return next(self._iterator)

    def _from_a_worker(self) -> Made:
        for number in range(self.config.workers):
            if number not in self._workers:
                self._workers[number] = self._start(number)
        number = self._rows % self.config.workers
        while True:
            try:
                made = self._workers[number].receive()
            except EOFError:
                self._start_anew(number)
                continue
            _ask_for_a_row(self._workers[number])
            self._deaths = 0
            return made

    def _start(self, number: int) -> Worker:
        """Start worker ``number``, which makes its rows after those taken so far."""
        workers = self.config.workers
        streams = list(self._states)[number::workers]
        first = max(0, -(-(self._rows - number) // workers))
        worker = Worker(work, self._source, {stream: self._states[stream] for stream in streams}, first)
        for _ in range(AHEAD):
            _ask_for_a_row(worker)
        return worker

    def _start_anew(self, number: int) -> None:
        """Replace a worker that has died.

        Raises:
            UserError: workers have died too often.
        """
        worker = self._workers.pop(number)
        (code,) = end([worker])
        self._deaths += 1
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        who = f"worker {number} of data rank {self.data_rank} died ({how}; {worker.note or 'before its first sample'})"
        if self._deaths >= MOST_DEATHS:
            self.close()
            raise UserError(
                f"data: {who}, {MOST_DEATHS} times without a row in between; take that sample out of the data if it is "
                "the same each time, or give the job more memory"
            )
        print(
            f"WARNING: data: {who}; another makes its rows ({self._deaths} in a row, {MOST_DEATHS} end the run)",
            file=sys.stderr,
            flush=True,
        )
        self._workers[number] = self._start(number)

    def _check_skipped(self) -> None:
        seen = sum(state.seen for state in self._states.values())
        skipped: dict[str, int] = {}
        for state in self._states.values():
            for reason, count in state.skipped.items():
                skipped[reason] = skipped.get(reason, 0) + count
        total = sum(skipped.values())
        if seen >= SKIP_GRACE and total > self.config.max_skip_fraction * seen:
            self.close()
            raise UserError(
                f"data: {total:,} of {seen:,} samples were refused ({describe(skipped)}), more than "
                f"data.max_skip_fraction={self.config.max_skip_fraction}; mend the shards or raise the limit"
            )


def build_loader(
    config: DataConfig,
    model: ModelConfig,
    *,
    split: str = "train",
    seed: int,
    data_rank: int = 0,
    data_world_size: int = 1,
) -> Loader:
    """Loader of one data rank: shuffled, endless, the sources blended by tokens.

    Rank r gets rows r, r + R, r + 2R, ... of one sequence that depends on ``config`` and ``seed`` alone, not on the
    number of ranks R or of ``config.workers``. Raises UserError when a source or the tokenizer is not usable, or when
    the streams cannot be shared evenly.
    """
    _check(config)
    share = data_world_size * max(1, config.workers)
    if config.streams % share:
        raise UserError(
            f"data.streams={config.streams} must be a multiple of data ranks ({data_world_size}) x data.workers "
            f"({config.workers}); set data.streams={-(-config.streams // share) * share}, or other data.workers"
        )
    allow_open_files()
    if config.workers:
        start_server()
    rows = Rows(config, model, split, seed)
    rows.open()
    if (longest := max(map(len, rows.sources))) < config.streams:
        raise UserError(f"data.streams={config.streams} are more than the {longest} samples; set fewer data.streams")
    return Loader(rows, data_rank, data_world_size)


def evaluation_rows(
    config: DataConfig,
    model: ModelConfig,
    *,
    split: str = "val",
    rows: int,
    data_rank: int = 0,
    data_world_size: int = 1,
) -> list[Row]:
    """This rank's share of the first ``rows`` rows of a split, the same at every call and in every layout.

    Each source is read in shard order and gives its share of the tokens.

    Every rank gets equally many; when the split has fewer than ``rows``, or ranks do not divide them, the rest is left
    out. Raises UserError when that leaves none.
    """
    _check(config)
    sources = open_sources(config, split, training=False)
    # The longest sequences of a large buffer come first, and a few rows would hold nothing else.
    config = dataclasses.replace(config, packing_buffer=1)
    tokenizer = Tokenizer(config.tokenizer)
    stream = open_stream(sources, tokenizer, config, model, stream=0, streams=1, seed=0, repeat=False)
    found = [row for row, _ in itertools.islice(StreamReader(stream, StreamState()), rows)]
    share = len(found) // data_world_size
    if share == 0:
        raise UserError(
            f"data.sources: the {split} split gives {len(found)} of the {rows} evaluation rows, and {data_world_size} "
            "data ranks need one each; put more shards into that split, or set schedule.eval_every=0"
        )
    return found[data_rank : share * data_world_size : data_world_size]


def _check(config: DataConfig) -> None:
    if not config.sources:
        raise UserError("data.sources is empty; name at least one folder of shards")
    if config.row_tokens <= 0 or config.alignment <= 0 or config.row_tokens % config.alignment:
        raise UserError(f"data.row_tokens={config.row_tokens} must be a multiple of data.alignment={config.alignment}")
    check_codes(config)


def _ask_for_a_row(worker: Worker) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died, which is noticed in its turn
        worker.end.send(b".")
