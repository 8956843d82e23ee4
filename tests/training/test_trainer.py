"""What the training loop logs of the samples that it was given."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest

from omni_train.recipe.schema import QualityConfig, StratumConfig
from tests.support.runs import run

STRATA = [
    StratumConfig("clean", QualityConfig(snr_db=[20.0, None])),
    StratumConfig("loud", QualityConfig(snr_db=[5.0, None]), 0.0),
    StratumConfig("rest", weight=0.5),
]


@contextlib.contextmanager
def stratified(trainer, rank):
    """Rows that say which strata their samples are of: more of the first rank, and more at every step."""
    rows = trainer.feed.rows

    def counted(count):
        found = rows(count)
        found[0].strata, found[0].left_out = {"clean": 2 + rank, "rest": trainer.step}, {"stratum_loud": 5 * rank}
        return found

    trainer.feed.rows = counted
    yield


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_strata_are_counted_over_ranks_and_since_the_run_began(distributed, tmp_path, engine):
    changes = {"data__strata": STRATA, "schedule__steps": 3}
    for stop_after in (2, 0):  # a run that stops, and goes on
        given = (str(tmp_path / "run"), engine, stratified, changes | {"schedule__stop_after": stop_after})
        assert all(outcome.whole for outcome in distributed(2, run, *given))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in logged] == [1, 2, 3]
    for number, one in enumerate(logged, start=1):
        clean, rest = 5 * number, 2 * sum(range(number))
        assert one["stratum_clean"] == clean / (clean + rest)
        assert one.get("stratum_rest", 0) == rest / (clean + rest)
        assert "stratum_loud" not in one
        assert {key: value for key, value in one.items() if key.startswith("left_out_")} == {
            "left_out_stratum_loud": 5 * number,
            "left_out_no_stratum": 0,
            "left_out_passed_over": 0,
        }


def test_a_run_without_strata_logs_none(distributed, tmp_path):
    (outcome,) = distributed(1, run, str(tmp_path / "run"), "megatron", None, {"schedule__steps": 1})
    assert outcome.whole
    (one,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not [key for key in one if key.startswith(("stratum", "left_out"))]
    assert "speech_frames_per_second" not in one


@contextlib.contextmanager
def speaking(trainer, rank):
    """Steps on a Talker's rows, as their numbers say."""
    step = trainer.engine.train_step
    trainer.engine.train_step = lambda *given: replace(step(*given), tokens_by_modality={"text": 3.0, "speech": 30.0})
    yield


def test_frames_of_speech_have_a_speed(distributed, tmp_path):
    distributed(1, run, str(tmp_path / "run"), "megatron", speaking, {"schedule__steps": 1})
    (one,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert one["speech_frames_per_second"] == 30 / one["step_seconds"]
