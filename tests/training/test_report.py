"""The table at the end of a run."""

from __future__ import annotations

import json

import pytest

from omni_train.training.report import main


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
