import json

from omni_train.training.callbacks import MetricsFile


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resume_step=0)
    for step in range(1, 8):
        first.on_metrics({"step": step, "loss": 1.0})
    first.close()
    again = MetricsFile(path, resume_step=5)
    again.on_metrics({"step": 6, "loss": 1.0})
    again.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsFile(path, resume_step=2).close()
    assert steps(path) == [1]


def test_a_loss_that_is_not_finite_is_written_as_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    file.on_metrics({"step": 1, "loss": float("nan")})
    file.close()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None}
