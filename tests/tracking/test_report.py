"""The table at the end of a run."""

from __future__ import annotations

import json
import os
import sys

import pytest

from omni_train.tracking import curves
from omni_train.tracking.report import main


@pytest.fixture
def run(tmp_path):
    """A run of 37 steps whose loss falls from 9 by 0.1 a step, evaluated once on the way."""
    rows = [
        {"step": step, "loss": 9.1 - step / 10, "lr": 3e-4, "tokens": 512 * step, "tokens_per_second": 1234.5}
        for step in range(1, 38)
    ]
    rows.insert(20, {"step": 20, "eval_loss": 77.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_shows_first_and_last_of_evenly_spaced_training_steps(run, capsys):
    assert main([str(run)]) == 0
    output = capsys.readouterr().out
    assert "loss 9.000 → 5.400 in 37 steps" in output
    body = [line.replace("│", " ").split() for line in output.splitlines() if line.startswith("│")]
    assert len(body) == 12
    assert body[0] == ["1", "512", "9.0000", "–", "3.00e-04", "1,234"]
    assert body[-1][:3] == ["37", "18,944", "5.4000"]
    assert "77" not in output


def test_a_reader_that_has_gone_fails_nothing(run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([str(run)]) == 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for what the stream still holds


def test_a_single_step_is_a_table_too(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("2.5000") == 1


@pytest.mark.parametrize("content", [None, '{"step": 3, "eval_loss": 1.0}\n'])
def test_a_run_without_steps_is_one_line_and_exit_2(tmp_path, capsys, content):
    if content:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_broken_lines_and_losses_that_are_no_number_do_not_stop_a_report(tmp_path, capsys):
    """A loss that is not finite is logged as null."""
    lines = [b'{"step": 1, "loss": null}', b'{"step": 2, "loss": 2.5}', b"\xff", b"[]", b'{"step": 3, "loss": "x", "lr']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert main([str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert "loss – → 2.500 in 2 steps" in output.out
    assert "3 of its 5 lines cannot be read" in output.err


@pytest.fixture
def pipeline(tmp_path):
    """Text alone, then with audio and held-out metrics; a stage that logged nothing, one that has not begun."""
    (tmp_path / "pipeline.yaml").write_text("first: {}\nsecond: {}\nthird: {}\nfourth: {}\n")
    steps = {
        "second": [
            {"step": 1, "tokens": 1500.0, "loss": 4.0, "loss_audio": 4.5},
            {"step": 2, "tokens": 3000.0, "loss": 3.0, "loss_text": 2.5, "eval_loss": 3.5, "eval_wer_de": 0.25},
            {"step": 3, "tokens": 4500.0, "loss": 2.75, "loss_text": 2.125, "grad_norm": None, "loss_image": None},
        ],
        "third": [],
        "first": [{"step": 7, "tokens": 70.0, "loss": 6.0, "loss_text": 6.0}],
    }
    for name, rows in steps.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_pipeline_is_a_table_of_its_stages_with_the_losses_last_logged(pipeline, capsys):
    assert main([str(pipeline)]) == 0
    body = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert body[0] == ["first", "7", "70", "6.000", "6.000", "–", "6.000", "–"]
    assert body[1] == ["second", "3", "4,500", "4.000", "2.750", "3.500", "2.125", "4.500"]
    assert body[2] == ["wer", "de", "0.250"]
    assert len(body) == 3


def test_a_talkers_stage_has_its_codebooks_and_its_frames(pipeline, capsys):
    with (pipeline / "third" / "metrics.jsonl").open("a") as file:
        talker = {"loss": 9.5, "loss_code0": 5.25, "loss_residual": 4.125, "speech_frames_per_second": 1234.4}
        file.write(json.dumps({"step": 4, "tokens": 80.0} | talker) + "\n")
    assert main([str(pipeline)]) == 0
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert lines[2] == ["third", "4", "80", "9.500", "9.500", "–", "–", "–", "5.250", "4.125", "1,234"]
    assert lines[0][-3:] == ["–", "–", "–"]


def test_parts_of_a_figure_that_is_there_as_a_whole_are_in_the_report_alone(pipeline, capsys):
    metrics = {"eval_wer": 0.5, "eval_wer_en": 0.75, "eval_wer_window_100": 0.625, "eval_wer_en_window_100": 0.875}
    metrics |= {"eval_codebook_used_03": 0.0625, "eval_codebook_used_least": 0.03125, "eval_stoi_failed": 0.125}
    with (pipeline / "second" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": 2.75} | metrics) + "\n")
    assert main([str(pipeline)]) == 0
    printed, written = capsys.readouterr().out, (pipeline / "report" / "report.md").read_text()
    for metric in ("0.500", "0.625", "0.031", "0.125"):
        assert metric in printed
    for metric in ("0.250", "0.750", "0.875", "0.062"):
        assert metric not in printed
        assert f"| {metric} |" in written


def test_a_pipelines_report_is_written_beside_its_stages_with_curves(pipeline):
    assert main([str(pipeline)]) == 0
    text = (pipeline / "report" / "report.md").read_text()
    assert "| stage | steps | tokens | first loss | last loss | held-out loss | text | audio |" in text
    assert "| wer de | 0.250 |" in text
    assert "](losses.png)" in text
    assert (pipeline / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_without_steps_is_one_line_and_exit_2(tmp_path, capsys):
    (tmp_path / "pipeline.yaml").write_text("first: {}\n")
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_speech_is_a_table_by_schedule(tmp_path, capsys):
    spoken = {"eval_speech_wer_turns_4_4": 0.125, "eval_tokens_before_sound_turns_4_4": 4.0}
    spoken |= {"eval_speech_wer_lead_8": 0.0625, "eval_tokens_before_sound_lead_8": 8.5}
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0} | spoken]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(tmp_path)]) == 0
    body = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "_" in line]
    assert [line[1:3] + line[5:7] for line in body] == [
        ["turns_4_4", "0.125", "–", "4.000"],
        ["lead_8", "0.062", "–", "8.500"],
    ]


def test_a_stage_that_logs_no_loss_by_modality_has_its_loss_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(curves, "_plot", lambda axes, steps, key, **style: drawn.append((axes.get_title(), key)))
    stages = {
        "s2": [{"step": 1, "loss": 2.0, "loss_audio": 2.5, "loss_text": 1.5}],
        "codec": [{"step": 1, "loss": 4.0, "loss_mel": 0.2}],
    }
    curves.draw_losses(stages, tmp_path / "losses.png")
    assert {key for stage, key in drawn if stage == "s2"} == {
        *("loss_audio", "loss_text", "eval_loss_audio", "eval_loss_text")
    }
    assert {key for stage, key in drawn if stage == "codec"} == {"loss", "eval_loss"}
    assert (tmp_path / "losses.png").stat().st_size > 1000
