"""The loader: a data rank's rows, from worker processes, restored exactly on any number of ranks and workers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from omni_train.data.batch import Row
from omni_train.data.codes import check_codes
from omni_train.data.sample import describe
from omni_train.data.sources import open_source
from omni_train.data.streams import Packer, StreamReader, StreamState, open_stream
from omni_train.data.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, ModelConfig

OPEN_FILES = 65536  # a stream keeps 16 shards of each source open with their indices, and a row its shared tensors
SKIP_GRACE = 1000  # samples before the skip limit applies


class Rows(IterableDataset):
    """A data rank's rows from number ``first`` on, in turn from its streams; worker w of W makes every W-th."""

    def __init__(self, open_stream: Callable[[int], Packer], states: dict[int, StreamState], first: int):
        self.open_stream = open_stream
        self.states = states
        self.first = first

    def __iter__(self) -> Iterator[tuple[int, Row | UserError, bytes | None]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        streams = list(self.states)
        readers: dict[int, StreamReader] = {}
        for number in itertools.count(self.first + worker, workers):
            stream = streams[number % len(streams)]
            try:
                if stream not in readers:
                    readers[stream] = StreamReader(self.open_stream(stream), self.states[stream])
                yield stream, *next(readers[stream])
            except UserError as error:
                yield stream, error, None  # raised inside a worker it would arrive as a stack trace
                return


class Loader:
    """The endless rows of one data rank. Iterate over it; ``state_dict`` is where the rows taken so far have led."""

    def __init__(
        self,
        config: DataConfig,
        open_stream: Callable[[int], Packer],
        source_samples: list[int],
        data_rank: int,
        data_world_size: int,
    ):
        self.config = config
        self.source_samples = source_samples
        self.world_size = data_world_size
        self._open_stream = open_stream
        self._states = {s: StreamState() for s in range(data_rank, config.streams, data_world_size)}
        self._rows = 0  # taken on this rank
        self._iterator: Iterator | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Row:
        """The next row. Raises UserError when more than ``data.max_skip_fraction`` of the samples were refused."""
        if self._iterator is None:
            self._iterator = self._start()
        stream, row, snapshot = next(self._iterator)
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
        """Plain containers, numbers and bytes; after any row, mid-pack included."""
        return {
            "world_size": self.world_size,
            "rows": self._rows,
            "source_samples": list(self.source_samples),
            "streams": {stream: copy.deepcopy(vars(state)) for stream, state in self._states.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the rows of ``state``, with any number of workers. For another number of ranks, see redistribute.

        Raises UserError when the state is of other data, another number of streams, or another layout of data ranks.
        """
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

    def _start(self) -> Iterator:
        rows = Rows(self._open_stream, copy.deepcopy(self._states), self._rows)
        workers = self.config.workers
        # What is garbage by now goes here, and a worker collects none before it has set its inheritance aside: FFmpeg's
        # filters wait for ever for threads of this process when a worker frees them.
        gc.collect()
        with warnings.catch_warnings(), _no_collection():
            # A worker inherits the open sources, and touches nothing that threads of this process hold (gloo, CUDA).
            warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # the recipe says how many
            return iter(
                DataLoader(
                    rows,
                    batch_size=None,
                    collate_fn=_unchanged,
                    num_workers=workers,
                    multiprocessing_context="fork" if workers else None,
                    worker_init_fn=_init_worker,
                    generator=torch.Generator(),  # else it draws from the generator of the model
                )
            )

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
    """The loader of one data rank: shuffled, endless, the sources blended by tokens.

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
    tokenizer = Tokenizer(config.tokenizer)
    sources = [open_source(source, split, training=True) for source in config.sources]
    samples = [len(source) for source in sources]
    if max(samples) < config.streams:
        raise UserError(
            f"data.streams={config.streams} are more than the {max(samples)} samples; set fewer data.streams"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    # A loader worker is forked; the tokenizer's own threads do not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    opened = partial(_open_repeating, sources, tokenizer, config, model, seed)
    return Loader(config, opened, samples, data_rank, data_world_size)


def evaluation_rows(
    config: DataConfig,
    model: ModelConfig,
    *,
    split: str = "val",
    rows: int,
    data_rank: int = 0,
    data_world_size: int = 1,
) -> list[Row]:
    """This rank's share of the first ``rows`` rows of a split, each source in shard order and in its share of the
    tokens: the same at every call and in every layout.

    Every rank gets equally many; when the split has fewer than ``rows``, or ranks do not divide them, the rest is left
    out. Raises UserError when that leaves none.
    """
    _check(config)
    sources = [open_source(source, split, training=False) for source in config.sources]
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


def redistribute(states: list[dict[str, Any]], data_world_size: int) -> list[dict[str, Any]]:
    """The states of all data ranks, in rank order, made over to another number of ranks: no row is lost or repeated.

    Raises UserError when the streams or the rows taken so far cannot be shared evenly among that many ranks.
    """
    world_size, rows = len(states), {state["rows"] for state in states}
    if len(rows) > 1:
        raise UserError(
            f"data: the ranks of the checkpoint took different numbers of rows ({sorted(rows)}); it is damaged"
        )
    streams = {stream: saved for state in states for stream, saved in state["streams"].items()}
    taken = rows.pop() * world_size
    if len(streams) % data_world_size or taken % data_world_size:
        raise UserError(
            f"data: {len(streams)} streams and {taken} rows taken by {world_size} data ranks cannot be shared evenly "
            f"among {data_world_size}; resume with a number of data ranks that divides both"
        )
    return [
        {
            "world_size": data_world_size,
            "rows": taken // data_world_size,
            "source_samples": states[0]["source_samples"],
            "streams": {s: streams[s] for s in range(rank, len(streams), data_world_size)},
        }
        for rank in range(data_world_size)
    ]


def _check(config: DataConfig) -> None:
    if not config.sources:
        raise UserError("data.sources is empty; name at least one folder of shards")
    if config.row_tokens <= 0 or config.alignment <= 0 or config.row_tokens % config.alignment:
        raise UserError(f"data.row_tokens={config.row_tokens} must be a multiple of data.alignment={config.alignment}")
    check_codes(config)


def _open_repeating(
    sources: list, tokenizer: Tokenizer, config: DataConfig, model: ModelConfig, seed: int, stream: int
) -> Packer:
    return open_stream(sources, tokenizer, config, model, stream=stream, streams=config.streams, seed=seed, repeat=True)


def _unchanged(item: Any) -> Any:
    return item


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _init_worker(worker: int) -> None:
    gc.freeze()  # what the parent owns (CUDA tensors, process groups, filters) must not be finalised here
    gc.enable()
    # Signals go to the whole job; the training process decides when to stop, and then asks by SIGTERM of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _exit_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
