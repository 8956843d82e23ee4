from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import pickle
import random

import pytest

from omni_train.data.rows import kinds
from omni_train.data.rows.batch import PackedBatch
from omni_train.data.samples import sample
from omni_train.data.samples.sources import LateReader
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, SourceConfig
from tests.data.conftest import MODEL, sentence

SEED = 29
ROW = 512
WEIGHTS = {"aa": 0.5, "bb": 0.3, "cc": 0.2}
WORDS = {"aa": (1, 4), "bb": (20, 60), "cc": (100, 140)}  # of a document: about 10, 80 and 250 tokens


def marked(name: str, count: int = 160) -> list[tuple[str, dict]]:
    """Documents that begin with the name of their source."""
    generator = random.Random(name)
    return [
        (f"{name}-{n:04d}", {"text": f"{name}{n} {sentence(generator, generator.randint(*WORDS[name]))}"})
        for n in range(count)
    ]


@pytest.fixture
def blended(config, write) -> DataConfig:
    sources = [SourceConfig(str(write(marked(name), name=name)), weight) for name, weight in WEIGHTS.items()]
    return dataclasses.replace(
        config, sources=sources, row_tokens=ROW, streams=2, packing_buffer=16, max_skip_fraction=1.0
    )


def shares(rows: list[PackedBatch], folder: str) -> dict[str, float]:
    """Of the real tokens, the fraction that each source gave."""
    tokenizer = Tokenizer(folder)
    found: collections.Counter = collections.Counter()
    for row in rows:
        for start, end in itertools.pairwise(row.cu_seqlens.tolist()):
            tokens = row.tokens[start:end][~row.padding[start:end]].tolist()
            if tokens:
                found[tokenizer.decode(tokens)[:2]] += len(tokens)
    return {name: count / found.total() for name, count in found.items()}


def test_weights_are_shares_of_the_tokens_however_long_the_samples_are(blended):
    rows = list(itertools.islice(build_loader(blended, MODEL, seed=SEED), 400))
    assert sum(row.samples for row in rows) > 5000
    assert shares(rows, blended.tokenizer) == pytest.approx(WEIGHTS, abs=0.01)


def test_refused_samples_count_for_nothing(blended, write):
    half = [(key, fields if n % 2 else {"caption": "x"}) for n, (key, fields) in enumerate(marked("bb"))]
    blended.sources[1].path = str(write(half, name="half"))
    rows = list(itertools.islice(build_loader(blended, MODEL, seed=SEED), 300))
    assert sum(row.skipped.get("no_messages", 0) for row in rows) > 200
    assert shares(rows, blended.tokenizer) == pytest.approx(WEIGHTS, abs=0.015)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_without_any_usable_sample_is_named(blended, write, workers):
    broken = [(key, {"caption": "x"}) for key, _ in marked("bb")]
    blended.sources[1].path = str(write(broken, name="hopeless"))
    blended.workers = workers
    message = r"1,000 samples in a row of .*/hopeless were refused \(no_messages 1,000\)"
    with pytest.raises(UserError, match=message):
        list(itertools.islice(build_loader(blended, MODEL, seed=SEED), 300))


def test_other_weights_after_a_resume_hold_from_there_on(blended):
    loader = build_loader(blended, MODEL, seed=SEED)
    list(itertools.islice(loader, 100))
    turned = {"aa": 0.1, "bb": 0.1, "cc": 0.8}
    for source, weight in zip(blended.sources, turned.values(), strict=True):
        source.weight = weight
    resumed = build_loader(blended, MODEL, seed=SEED)
    resumed.load_state_dict(loader.state_dict())
    rows = list(itertools.islice(resumed, 300))
    assert shares(rows, blended.tokenizer) == pytest.approx(turned, abs=0.03)


def test_streams_without_a_sample_of_a_small_source_go_on_with_the_others(blended, write):
    blended.sources[1].path = str(write(marked("bb", count=1), shards=1, name="single"))
    rows = list(itertools.islice(build_loader(blended, MODEL, seed=SEED), 40))
    found = [set(shares(rows[stream::2], blended.tokenizer)) for stream in range(2)]
    assert sorted(found, key=len) == [{"aa", "cc"}, {"aa", "bb", "cc"}]


def test_held_out_rows_hold_every_source_in_its_share(blended):
    rows = evaluation_rows(blended, MODEL, split="train", rows=6)
    assert shares(rows, blended.tokenizer) == pytest.approx(WEIGHTS, abs=0.05)
    every_sample = evaluation_rows(blended, MODEL, split="train", rows=10_000)
    assert sum(row.samples for row in every_sample) == 3 * 160


def test_shuffling_and_restoring_read_only_what_is_packed(blended, monkeypatch):
    read = []

    def counted(self, index, pointer, original=LateReader._read):
        read.append(index)
        return original(self, index, pointer)

    monkeypatch.setattr(LateReader, "_read", counted)
    blended = dataclasses.replace(blended, shuffle_buffer=150, packing_buffer=4)
    loader = build_loader(blended, MODEL, seed=SEED)
    next(loader)
    assert len(read) < 100
    rows = list(itertools.islice(loader, 80))
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    resumed = build_loader(blended, MODEL, seed=SEED)
    resumed.load_state_dict(state)
    before = len(read)
    next(resumed)
    per_row = sum(row.samples for row in rows) / len(rows)
    assert len(read) - before < 20 * per_row  # at most 16 rows of the stream are made again


def test_an_unexpected_error_costs_its_sample_and_is_logged_once(blended, monkeypatch, caplog):
    def fragile(given, *args, original=kinds.sequences_of, **kwargs):
        if given.text.startswith("bb1"):
            raise ZeroDivisionError("nothing to divide by")
        return original(given, *args, **kwargs)

    monkeypatch.setattr(kinds, "sequences_of", fragile)
    monkeypatch.setattr(sample, "_logged", set())
    with caplog.at_level(logging.WARNING):
        rows = evaluation_rows(blended, MODEL, split="train", rows=10_000)
    skipped = sum((collections.Counter(row.skipped) for row in rows), collections.Counter())
    assert skipped == {"unexpected_ZeroDivisionError": 71}  # 1, 10 to 19, 100 to 159
    assert sum(row.samples for row in rows) == 3 * 160 - 71
    assert len(caplog.records) == 1
    assert "nothing to divide by" in caplog.text


def test_a_failed_assertion_is_not_taken_for_a_bad_sample(blended, monkeypatch):
    def wrong(*args, **kwargs):
        raise AssertionError("a mistake of ours")

    monkeypatch.setattr(kinds, "sequences_of", wrong)
    with pytest.raises(AssertionError, match="a mistake of ours"):
        next(build_loader(blended, MODEL, seed=SEED))
