"""Damaged samples are skipped, counted and reported; too many end the run in one line."""

from __future__ import annotations

import shutil
import tarfile

import pytest

from tests.e2e.conftest import Runs


@pytest.fixture
def damaged(world, tmp_path):
    """The world with its first shard cut short and a sample of the second without valid JSON."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    first, second, *_ = sorted((copy / "text").glob("train-*.tar"))
    with tarfile.open(first) as tar:
        cut = tar.getmembers()[60].offset_data + 3
    with first.open("r+b") as file:
        file.truncate(cut)
    with tarfile.open(second) as tar:
        start = tar.getmembers()[5].offset_data
    with second.open("r+b") as file:
        file.seek(start)
        file.write(b"{[")
    return Runs(copy, tmp_path)


def test_the_run_goes_on_and_says_what_it_skipped(damaged):
    err = damaged.finish("run=skips", "data.max_skip_fraction=1", "schedule.steps=40")
    counted = damaged.metrics("skips")[-1]["skipped_samples"]
    assert counted > 0
    reported = [line for line in err.splitlines() if "samples skipped so far" in line]
    assert "truncated_shard" in reported[-1]
    assert "broken_json" in reported[-1]
    by_reason = reported[-1].split("so far: ")[1].split(", ")
    assert counted == sum(int(reason.split()[1]) for reason in by_reason)
    assert "Traceback" not in err


def test_too_many_skipped_samples_end_the_run_in_one_line(damaged):
    err = damaged.finish("run=stops", "data.max_skip_fraction=0.001", "schedule.steps=500", status=2)
    last = err.splitlines()[-1]
    assert "error: " in last
    assert "max_skip_fraction" in last
    assert "Traceback" not in err
