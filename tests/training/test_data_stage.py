"""A stage of a pipeline that makes data: its process, what the ranks do meanwhile, and when it is complete."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest

from omni_train.checkpoint.integrity import DIGESTS, DamagedCheckpoint
from omni_train.errors import RunFailed
from omni_train.recipe.data_stage import DataStage
from omni_train.training import beside, data_stage
from tests.support.data_command import write


def stage_of(folder: Path, **words: str) -> DataStage:
    return DataStage("data write", write, {"codec": "c", **words, "out": str(folder / "codes")})


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Makes the data of a stage on a rank without others; returns what its processes wrote."""
    lock = type("Lock", (), {"check": lambda self: None})()
    monkeypatch.setattr(data_stage.platform, "joined", nullcontext)
    monkeypatch.setattr(data_stage.failures, "listen", lambda: None)
    monkeypatch.setattr(beside, "_PATIENCE", 0.0)

    def make(**words: str) -> list:
        data_stage.make_data(stage_of(tmp_path, **words), "codes", "stage 2 of 3, codes", lock)
        return [json.loads(line) for line in (tmp_path / "codes" / "calls").read_text().splitlines()]

    yield make
    data_stage.stopping._where = ""


def test_it_is_skipped_once_it_is_complete_and_run_again_when_what_it_reads_has_changed(made, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    codec = tmp_path / "codec" / "step_00000003"
    codec.mkdir(parents=True)
    for name in ("metadata.json", DIGESTS):
        (codec / name).write_text("{}")
    once = [str(codec), [], True]  # no rank, in a session of its own
    assert made(codec=str(codec)) == [once]
    assert made(codec=str(codec)) == [once]
    (codec / DIGESTS).write_text('{"model.pt": [7, "00"]}')
    assert made(codec=str(codec)) == [once] * 2
    (tmp_path / "codes" / data_stage.RECORD).unlink()
    assert made(codec=str(codec)) == [once] * 3


def test_what_it_reads_is_known_by_its_content(tmp_path):
    shards, file = tmp_path / "shards", tmp_path / "lines.jsonl"
    (shards / ".nv-meta").mkdir(parents=True)
    before = []
    for text in ("one", "other"):
        (shards / ".nv-meta" / "index.uuid").write_text(text)
        file.write_text(text)
        before.append(
            data_stage._origin(stage_of(tmp_path, data=str(shards), manifest=str(file), codec="no path"))["contents"]
        )
    assert before[0].keys() == before[1].keys() == {"data", "manifest"}
    assert all(before[0][key] != before[1][key] for key in before[0])


def test_its_users_error_is_the_stages_of_the_same_kind(made, tmp_path):
    with pytest.raises(DamagedCheckpoint, match=r"^codes: x/step_00000007: damaged: model\.pt has 3 bytes") as error:
        made(codec="x/step_00000007", fault="damaged")
    assert error.value.checkpoint == Path("x/step_00000007")
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("fault", "how"), [("killed", "was killed by SIGKILL"), ("crashed", "exited with code 1, as is said above")]
)
def test_where_its_process_does_not_end_by_itself_another_try_may_help(made, tmp_path, fault, how, capfd):
    with pytest.raises(
        RunFailed, match=rf"^codes: `omni-train data write codec=c fault={fault} out=.*` {how}; the same"
    ):
        made(fault=fault)
    assert ("ZeroDivisionError: a defect" in capfd.readouterr().err) == (fault == "crashed")
    assert not data_stage.is_made(stage_of(tmp_path, fault=fault))


def wait_for_it(rank, world_size, folder):
    """How often the first rank calls to the others while it waits, and whether the data are there when each goes on."""
    lock = type("Lock", (), {"check": lambda self: None})()
    with (
        patch.object(data_stage, "wait_on", wraps=data_stage.wait_on) as called,
        patch.object(beside, "POLL_SECONDS", 0.1),
        patch.object(data_stage.failures, "listen"),
    ):
        data_stage.make_data(stage_of(folder, seconds="0.5"), "codes", "stage 2 of 3, codes", lock)
    return called.call_count, (folder / "codes" / data_stage.RECORD).exists()


def test_the_other_ranks_wait_as_long_as_it_takes(distributed, tmp_path):
    (calls, there), (others, there_too) = distributed(2, wait_for_it, tmp_path)
    assert there and there_too
    assert calls >= 5
    assert others == 0
    assert len((tmp_path / "codes" / "calls").read_text().splitlines()) == 1
