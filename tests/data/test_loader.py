from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.loader import Loader, build_loader, evaluation_rows
from omni_train.data.stream.made import Rows
from omni_train.data.stream.states import redistribute
from omni_train.data.workers import SIGNALS
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, SourceConfig
from tests.data.conftest import MODEL, documents

SEED = 37


def take(loader: Loader, count: int) -> list[PackedBatch]:
    return list(itertools.islice(loader, count))


def assert_same(rows: list[PackedBatch], others: list[PackedBatch]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name in PackedBatch.TENSORS + PackedBatch.MEDIA:
            assert torch.equal(getattr(row, name), getattr(other, name)), name
        assert (row.samples, row.skipped) == (other.samples, other.skipped)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def texts(rows: list[PackedBatch], folder: str) -> collections.Counter:
    """How often each sequence occurs in ``rows``, as text."""
    tokenizer = Tokenizer(folder)
    found = collections.Counter()
    for row in rows:
        for start, end in itertools.pairwise(row.cu_seqlens.tolist()):
            tokens = row.tokens[start:end][~row.padding[start:end]].tolist()
            if tokens:
                found[tokenizer.decode(tokens)] += 1
    return found


def test_rows_are_well_formed_and_nearly_full(config):
    rows = take(build_loader(config, MODEL, seed=SEED), 80)
    for row in rows:
        assert row.tokens.shape == (config.row_tokens,)
        assert row.position_ids.shape == (3, config.row_tokens)
        assert row.cu_seqlens[0] == 0
        assert row.cu_seqlens[-1] == config.row_tokens
        assert (row.cu_seqlens % config.alignment == 0).all()
        assert (row.labels[row.padding] == IGNORE).all()
        assert row.num_loss_tokens > 0
        assert torch.equal(row.loss_weights != 0, row.labels != IGNORE)
    unfilled = sum(int(row.cu_seqlens[-1] - row.cu_seqlens[-2]) for row in rows if row.padding[row.cu_seqlens[-2]])
    assert unfilled / (80 * config.row_tokens) < 0.03


def test_an_epoch_reads_every_sample(config, sources, tokenizer_folder):
    config.sources = [SourceConfig(str(sources[0]))]
    config.streams = 1
    config.shuffle_buffer = 1
    expected = {fields["text"].split(":")[0] for _, fields in documents(390, seed=7)[40:]}
    rows = []
    for row in build_loader(config, MODEL, seed=SEED):
        rows.append(row)
        if sum(row.samples for row in rows) > 350 + config.packing_buffer:
            break
    begun = collections.Counter(text.split(":")[0] for text in texts(rows, str(tokenizer_folder)) if ":" in text[:5])
    assert expected <= set(begun)


def test_seeds_give_other_rows(config):
    one, other = (take(build_loader(config, MODEL, seed=seed), 8) for seed in (SEED, SEED + 1))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


def test_loading_leaves_the_training_process_its_random_numbers(config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(build_loader(dataclasses.replace(config, workers=1), MODEL, seed=SEED), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_rows_do_not_depend_on_the_number_of_workers(config, workers):
    expected = take(build_loader(config, MODEL, seed=SEED), 30)
    assert_same(take(build_loader(dataclasses.replace(config, workers=workers), MODEL, seed=SEED), 30), expected)


def test_rows_do_not_depend_on_the_number_of_data_ranks(config):
    expected = take(build_loader(config, MODEL, seed=SEED), 36)
    for world_size, workers in ((2, 0), (4, 1), (2, 2)):
        per_rank = [
            take(
                build_loader(
                    dataclasses.replace(config, workers=workers),
                    MODEL,
                    seed=SEED,
                    data_rank=rank,
                    data_world_size=world_size,
                ),
                36 // world_size,
            )
            for rank in range(world_size)
        ]
        assert_same([row for step in zip(*per_rank, strict=True) for row in step], expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 7, 64, 91])
def test_a_restored_loader_goes_on_with_the_same_rows(config, workers, taken):
    config.workers = workers
    loader = build_loader(config, MODEL, seed=SEED)
    take(loader, taken)
    state = through_a_file(loader.state_dict())
    expected = take(loader, 75)
    restored = build_loader(config, MODEL, seed=SEED)
    restored.load_state_dict(state)
    assert_same(take(restored, 75), expected)


def test_a_stream_restored_again_and_again_does_not_drift(config):
    config.workers = 2
    expected = take(build_loader(config, MODEL, seed=SEED), 60)
    rows, state = [], None
    for count in (1, 2, 30, 1, 26):
        loader = build_loader(config, MODEL, seed=SEED)
        if state is not None:
            loader.load_state_dict(state)
        rows += take(loader, count)
        state = through_a_file(loader.state_dict())
    assert_same(rows, expected)


def test_a_waiting_sample_that_can_no_longer_be_read_is_named(config, monkeypatch):
    config.workers = 0
    loader = build_loader(config, MODEL, seed=SEED)
    take(loader, 91)
    state = through_a_file(loader.state_dict())
    assert any(stream["snapshot"] for stream in state["streams"].values())

    def gone(*_, **__):
        raise SampleError("media_missing")

    monkeypatch.setattr("omni_train.data.rows.kinds.sequences_of", gone)
    restored = build_loader(config, MODEL, seed=SEED)
    restored.load_state_dict(state)
    with pytest.raises(UserError, match=r"waited to be packed .* refused \(media_missing\); resume on the same shards"):
        take(restored, 1)


def test_a_state_restores_under_another_number_of_workers(config):
    loader = build_loader(config, MODEL, seed=SEED)
    take(loader, 21)
    restored = build_loader(dataclasses.replace(config, workers=2), MODEL, seed=SEED)
    restored.load_state_dict(loader.state_dict())
    assert_same(take(restored, 20), take(loader, 20))


def _restore_elsewhere(file: str) -> None:
    saved = torch.load(file, weights_only=False)
    loader = build_loader(saved["config"], MODEL, seed=SEED)
    loader.load_state_dict(saved["state"])
    torch.save(take(loader, 20), file)


def test_a_new_process_goes_on_with_the_same_rows_and_says_nothing(config, tmp_path):
    config.workers = 2
    loader = build_loader(config, MODEL, seed=SEED)
    take(loader, 43)
    torch.save({"config": config, "state": loader.state_dict()}, tmp_path / "state.pt")
    program = f"from tests.data.test_loader import _restore_elsewhere as go\ngo({str(tmp_path / 'state.pt')!r})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=False), take(loader, 20))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_redistribution_over_data_ranks_loses_and_repeats_nothing(config, before, after):
    expected = take(build_loader(config, MODEL, seed=SEED), 60)

    def rank_loaders(count: int) -> list[Loader]:
        return [build_loader(config, MODEL, seed=SEED, data_rank=rank, data_world_size=count) for rank in range(count)]

    loaders = rank_loaders(before)
    for loader in loaders:
        take(loader, 20 // before)
    states = redistribute([through_a_file(loader.state_dict()) for loader in loaders], after)
    loaders = rank_loaders(after)
    for loader, state in zip(loaders, states, strict=True):
        loader.load_state_dict(state)
    per_rank = [take(loader, 40 // after) for loader in loaders]
    assert_same([row for step in zip(*per_rank, strict=True) for row in step], expected[20:])


def _first_rows(rank: int, world_size: int, config: DataConfig) -> list[PackedBatch]:
    return take(build_loader(config, MODEL, seed=SEED, data_rank=rank, data_world_size=world_size), 10)


def test_workers_load_beside_process_groups(config, distributed):
    expected = take(build_loader(config, MODEL, seed=SEED), 20)
    one, other = distributed(2, _first_rows, dataclasses.replace(config, workers=2))
    assert_same([row for step in zip(one, other, strict=True) for row in step], expected)


def test_a_process_that_loads_is_never_forked(config, monkeypatch):
    """Not even where it has no threads yet: what holds for tests has to hold beside CUDA and NCCL."""
    expected = take(build_loader(config, MODEL, seed=SEED), 6)

    def refused() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", refused)
    assert_same(take(build_loader(dataclasses.replace(config, workers=2), MODEL, seed=SEED), 6), expected)


def test_evaluation_rows_are_the_same_every_time_and_shared_among_ranks(config):
    rows = evaluation_rows(config, MODEL, rows=7)
    assert len(rows) == 7
    assert_same(evaluation_rows(config, MODEL, rows=7), rows)
    halves = [evaluation_rows(config, MODEL, rows=7, data_rank=rank, data_world_size=2) for rank in range(2)]
    assert_same([row for step in zip(*halves, strict=True) for row in step], rows[:6])


def test_evaluation_ends_with_the_split(config, tokenizer_folder):
    config.sources = config.sources[:1]
    rows = evaluation_rows(config, MODEL, rows=10_000)
    begun = {text.split(":")[0] for text in texts(rows, str(tokenizer_folder))}
    assert {fields["text"].split(":")[0] for _, fields in documents(390, seed=7)[:40]} <= begun
    assert sum(row.samples for row in rows) == 40


def workers_of(loader: Loader) -> list[psutil.Process]:
    return [psutil.Process(worker.pid) for _, worker in sorted(loader._workers.items())]


def test_workers_outlive_signals_to_the_job_and_end_with_the_loader(config):
    loader = build_loader(dataclasses.replace(config, workers=2), MODEL, seed=SEED)
    expected = take(build_loader(config, MODEL, seed=SEED), 40)
    rows = take(loader, 5)
    workers = workers_of(loader)
    assert len(workers) == 2
    for process in [*workers, workers[0].parent()]:
        for number in SIGNALS:  # as a scheduler sends them, not the training process
            process.send_signal(number)
    assert_same(rows + take(loader, 35), expected)
    assert workers == workers_of(loader)
    loader.close()
    assert not any(worker.is_running() for worker in workers)


def test_loaders_share_a_fork_server(config):
    loaders = [build_loader(dataclasses.replace(config, workers=1), MODEL, seed=seed) for seed in range(2)]
    for loader in loaders:
        next(loader)
    (one,), (other,) = map(workers_of, loaders)
    assert one.ppid() == other.ppid()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_replaced_and_no_row_is_lost_or_repeated(config, number, capfd):
    expected = take(build_loader(config, MODEL, seed=SEED), 90)
    loader = build_loader(dataclasses.replace(config, workers=2), MODEL, seed=SEED)
    rows = take(loader, 75)
    undisturbed, killed = workers_of(loader)
    killed.send_signal(number)
    rows += take(loader, 15)
    assert_same(rows, expected)
    assert workers_of(loader)[0] == undisturbed
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(lines) == 1
    assert re.search(
        rf"WARNING: data: worker 1 of data rank 0 died \(killed by {number.name}; the last sample that it began is "
        r"number \d+ of its source, in /.*\.tar\); another makes its rows \(1 in a row, 3 end the run\)$",
        lines[0],
    )


def test_a_fork_server_that_dies_is_replaced_with_its_workers(config, capfd):
    expected = take(build_loader(config, MODEL, seed=SEED), 40)
    loader = build_loader(dataclasses.replace(config, workers=2), MODEL, seed=SEED)
    rows = take(loader, 11)
    workers = workers_of(loader)
    workers[0].parent().kill()
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        time.sleep(0.01)  # the server takes a while to end, and they make rows until then
    assert_same(rows + take(loader, 29), expected)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert capfd.readouterr().err.count("WARNING: data: worker") == 2


@dataclasses.dataclass
class Deadly(Rows):
    """Rows of which the fourth of a worker kills it, whatever it tries."""

    def made(self, states, first):
        for number, item in enumerate(super().made(states, first), start=first):
            if number >= 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item


def test_a_sample_that_kills_every_worker_ends_the_run_in_one_line(config, capfd):
    rows = Deadly(dataclasses.replace(config, workers=2), MODEL, "train", SEED)
    loader = Loader(rows, 0, 1)
    assert_same(take(loader, 6), take(build_loader(config, MODEL, seed=SEED), 6))
    with pytest.raises(
        UserError,
        match=r"data: worker 0 of data rank 0 died \(killed by SIGKILL; .* number \d+ of its source, in .*\.tar\), "
        r"3 times without a row in between; take that sample out",
    ):
        next(loader)
    assert capfd.readouterr().err.count("WARNING") == 2
    assert not loader._workers


@dataclasses.dataclass
class Faulty(Rows):
    """Rows that a mistake of ours ends."""

    def made(self, states, first):
        yield from itertools.islice(super().made(states, first), 2)
        raise ZeroDivisionError("a mistake of ours")


def test_an_error_in_a_worker_arrives_with_its_trace(config):
    loader = Loader(Faulty(dataclasses.replace(config, workers=1), MODEL, "train", SEED), 0, 1)
    take(loader, 2)
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*in made.*ZeroDivisionError: a mistake of ours"):
        next(loader)


def test_an_index_that_changes_under_a_run_is_told_from_the_one_it_began_with(config, write):
    folder = write(documents(30, seed=1))
    config = dataclasses.replace(config, sources=[SourceConfig(str(folder))], workers=1)
    loader = build_loader(config, MODEL, seed=SEED)
    assert write(documents(40, seed=1)) == folder
    with pytest.raises(
        UserError, match=r"index was changed .* \(?samples per source were \[30\], now \[40\]; restore it"
    ):
        next(loader)


def test_a_process_that_ends_with_a_live_loader_does_not_hang(config, tmp_path):
    torch.save(dataclasses.replace(config, workers=2), tmp_path / "config.pt")
    program = (
        "import torch\nfrom omni_train.data.stream.loader import build_loader\n"
        "from omni_train.recipe.schema import ModelConfig\n"
        f"config = torch.load({str(tmp_path / 'config.pt')!r}, weights_only=False)\n"
        "loader = build_loader(config, ModelConfig(), seed=1)\n"
        "keep = [loader]; keep.append(keep)\nprint(next(loader).samples > 0)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "True\n", "")


def test_workers_may_open_more_files_than_a_shell_allows(config):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))  # more than a process with other tests behind it has open
    try:
        next(build_loader(config, MODEL, seed=SEED))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
