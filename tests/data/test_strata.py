"""Strata: samples are drawn in proportion to their weights, the same however many processes read, and counted."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
from pathlib import Path

import pytest

from omni_train.data.rows.base import Reading
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.strata import LeftOut, Strata
from omni_train.data.stream import blend, loader
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.data.stream.states import redistribute
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, QualityConfig, SourceConfig, StratumConfig
from tests.data.conftest import MODEL, sentence
from tests.data.test_loader import assert_same, take, texts, through_a_file

SEED = 41
GOOD, FAIR, UNSCORED = 113, 71, 37
ABOVE_3 = QualityConfig(dnsmos=[3.0, None])
SCORED = QualityConfig(snr_db=[None, 100.0])


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """Documents whose text begins with their stratum and number."""
    generator, samples = random.Random(2), []
    for stratum, count, quality in (
        ("good", GOOD, {"dnsmos": 3.5, "snr_db": 31.0}),
        ("fair", FAIR, {"dnsmos": 2.9, "snr_db": 12.0}),
        ("unscored", UNSCORED, None),
    ):
        for n in range(count):
            text = f"{stratum}{n}: {sentence(generator, generator.choice([4, 11, 23, 37, 300]))}"
            samples.append((f"{stratum}-{n:04d}", {"text": text, "meta": {"quality": quality} if quality else {}}))
    generator.shuffle(samples)
    folder = tmp_path_factory.mktemp("scored") / "scored"
    write_shards(folder, "train", samples, 4)
    write_shards(folder, "val", [(f"val-{key}", fields) for key, fields in samples[:40]], 1)
    index_shards(folder)
    return folder


@pytest.fixture
def data(config: DataConfig, scored: Path) -> DataConfig:
    config.sources = [SourceConfig(str(scored))]
    config.strata = [
        StratumConfig("good", ABOVE_3, 1.0),
        StratumConfig("fair", SCORED, 0.25),
        StratumConfig("rest", QualityConfig(), 0.5),
    ]
    return config


def counts(rows) -> tuple[collections.Counter, collections.Counter]:
    """Samples by stratum, and those left out by reason."""
    drawn, left_out = collections.Counter(), collections.Counter()
    for row in rows:
        drawn.update(row.strata)
        left_out.update(row.left_out)
    return drawn, left_out


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"quality": {"dnsmos": 3.0, "snr_db": 20.0}}, "clean"),  # bounds are inclusive
        ({"quality": {"dnsmos": 2.999, "snr_db": 20.0}}, "quiet"),
        ({"quality": {"dnsmos": 3.4, "snr_db": 15.0}}, "quiet"),
        ({"quality": {"snr_db": 15.1}}, LeftOut("no_stratum")),
        ({"quality": {"dnsmos": None, "snr_db": True}}, LeftOut("no_stratum")),
        ({"quality": {}}, SampleError("unscored")),
        ({"quality": "good"}, SampleError("unscored")),
        ({}, SampleError("unscored")),
        ({"quality": {"clipping": 0.7}}, LeftOut("stratum_broken")),
    ],
)
def test_the_first_stratum_that_matches_is_a_samples_own(meta, expected):
    strata = Strata(
        [
            StratumConfig("broken", QualityConfig(clipping=[0.5, 0.9]), 0.0),
            StratumConfig("clean", QualityConfig(dnsmos=[3.0, None], snr_db=[20.0, 40.0]), 2.0),
            StratumConfig("quiet", QualityConfig(dnsmos=[None, 3.4]), 2.0),
        ]
    )
    if isinstance(expected, SampleError):
        with pytest.raises(SampleError) as refused:
            strata.draw(meta, 0)
        assert (type(refused.value), refused.value.reason) == (type(expected), expected.reason)
    else:
        assert strata.draw(meta, 2**63 - 1) == expected


def test_a_sample_is_drawn_in_the_share_of_passes_that_its_weight_says(tokenizer):
    strata = Strata([StratumConfig("good", ABOVE_3, 4.0), StratumConfig("rest", QualityConfig(), 0.7)])
    drawn = 0
    for repetition in range(4000):
        reading = Reading(tokenizer, DataConfig(), MODEL, SEED, ("stratum", "Epochs", repetition, 7))
        with contextlib.suppress(LeftOut):
            drawn += strata.draw({}, reading.draw) == "rest"
    assert drawn / 4000 == pytest.approx(0.7 / 4.0, abs=0.02)  # a standard deviation is 0.006


def test_samples_of_a_run_are_in_proportion_to_their_weights(data, tokenizer_folder):
    rows = take(build_loader(data, MODEL, seed=SEED), 300)
    drawn, left_out = counts(rows)
    assert sum(drawn.values()) == sum(row.samples for row in rows)
    shares = {"good": GOOD * 1.0, "fair": FAIR * 0.25, "rest": UNSCORED * 0.5}
    for name, share in shares.items():
        assert drawn[name] / drawn.total() == pytest.approx(share / sum(shares.values()), abs=0.03)
    assert set(left_out) == {"passed_over"}
    found = collections.Counter()
    for text, times in texts(rows, str(tokenizer_folder)).items():
        found[text.partition(":")[0].rstrip("0123456789")] += times
    assert found["good"] == drawn["good"] and found["fair"] == drawn["fair"] and found["unscored"] == drawn["rest"]


def test_no_sample_is_drawn_twice_in_one_pass(data, tokenizer_folder):
    data.streams, data.shuffle_buffer, data.packing_buffer = 1, 1, 1
    data.strata = [StratumConfig("good", ABOVE_3, 8.0), StratumConfig("rest", QualityConfig(), 4.0)]
    rows = []
    for row in build_loader(data, MODEL, seed=SEED):
        rows.append(row)
        drawn, left_out = counts(rows)
        if drawn.total() + left_out.total() >= GOOD + FAIR + UNSCORED - 8:  # one of the next pass would come twice
            break
    found = texts(rows, str(tokenizer_folder))
    assert max(found.values()) == 1
    assert GOOD - 12 <= sum(text.startswith("good") for text in found) <= GOOD


def test_rows_and_counts_do_not_depend_on_workers_and_data_ranks(data):
    expected = take(build_loader(data, MODEL, seed=SEED), 24)
    assert any(row.strata.get("fair") for row in expected) and any(row.left_out for row in expected)

    def same(rows):
        assert_same(rows, expected)
        assert [(row.strata, row.left_out) for row in rows] == [(row.strata, row.left_out) for row in expected]

    same(take(build_loader(dataclasses.replace(data, workers=2), MODEL, seed=SEED), 24))
    ranks = [take(build_loader(data, MODEL, seed=SEED, data_rank=rank, data_world_size=2), 12) for rank in range(2)]
    same([row for step in zip(*ranks, strict=True) for row in step])


@pytest.mark.parametrize(("taken", "ranks"), [(13, 1), (30, 2)])
def test_a_run_that_resumes_draws_and_counts_the_same(data, taken, ranks):
    def loaders():
        return [build_loader(data, MODEL, seed=SEED, data_rank=rank, data_world_size=ranks) for rank in range(ranks)]

    before = build_loader(data, MODEL, seed=SEED)
    take(before, taken)
    state = through_a_file(before.state_dict())
    expected = take(before, 20)
    after = loaders()
    for rank, part in enumerate(redistribute([state], ranks)):
        after[rank].load_state_dict(part)
    rows = [row for step in zip(*(take(one, 20 // ranks) for one in after), strict=True) for row in step]
    assert_same(rows, expected)
    assert [(row.strata, row.left_out) for row in rows] == [(row.strata, row.left_out) for row in expected]


def test_what_weights_leave_out_is_counted_and_stops_no_run(data, monkeypatch):
    monkeypatch.setattr(loader, "SKIP_GRACE", 10)
    monkeypatch.setattr(blend, "HOPELESS_SAMPLES", 4)
    data.strata = [StratumConfig("good", ABOVE_3, 0.0), StratumConfig("unscored", QualityConfig(), 1.0)]
    data.strata.insert(1, StratumConfig("fair", QualityConfig(dnsmos=[2.0, None], snr_db=[50.0, None]), 1.0))
    rows = take(build_loader(data, MODEL, seed=SEED), 150)
    drawn, left_out = counts(rows)
    assert set(drawn) == {"unscored"} and set(left_out) == {"stratum_good"}
    assert left_out["stratum_good"] / drawn["unscored"] == pytest.approx(GOOD / (FAIR + UNSCORED), rel=0.15)
    assert not any(row.skipped for row in rows)


def test_samples_without_scores_are_a_fault_unless_a_stratum_takes_them(data, monkeypatch):
    monkeypatch.setattr(loader, "SKIP_GRACE", 10)
    data.strata = data.strata[:2]
    with pytest.raises(UserError, match=r"were refused \(unscored \d+ \(data.strata asks for scores: run omni-train"):
        take(build_loader(data, MODEL, seed=SEED), 20)


def test_strata_that_leave_out_a_whole_source_end_the_run_in_one_line(data, monkeypatch):
    monkeypatch.setattr(blend, "HOPELESS_SAMPLES", 10)
    data.strata = [StratumConfig("best", QualityConfig(dnsmos=[4.5, None])), StratumConfig("rest", weight=0.0)]
    with pytest.raises(UserError, match=r"samples in a row of .*scored were refused \(stratum_rest [\d,]+\); .*strata"):
        take(build_loader(data, MODEL, seed=SEED), 1)


def test_held_out_samples_are_read_whatever_the_strata(data):
    without = evaluation_rows(dataclasses.replace(data, strata=[]), MODEL, rows=4)
    data.strata = [StratumConfig("none", QualityConfig(dnsmos=[5.0, None]))]
    assert_same(evaluation_rows(data, MODEL, rows=4), without)
