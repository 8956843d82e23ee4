import json

import pytest

from omni_train.errors import RunFailed, UserError
from omni_train.tracking.base import Callback, Spared
from omni_train.tracking.metrics_file import MetricsFile


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


@pytest.mark.parametrize(
    "line",
    [b'{"step": 2, "lo', b"[1, 2]", b"null", b'{"loss": 1.0}', b'{"step": "2"}', b"\xff\xfe\x00", b"[" * 100_000],
    ids=["cut short", "list", "null", "no step", "text", "not UTF-8", "deep"],
)
def test_a_broken_line_is_dropped_and_said_once(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    MetricsFile(path, resume_step=3).close()
    assert steps(path) == [1, 3]
    assert capsys.readouterr().err == f"WARNING: {path}: 1 of its 3 lines cannot be read and are left out\n"


def test_what_cannot_be_written_is_kept_and_written_later_in_order(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    file.on_metrics({"step": 1})
    good = file._file
    with open("/dev/full", "ab", buffering=0) as full:
        file._file = full
        for step in (2, 3):
            file.on_metrics({"step": step})
    file._file = good
    file.on_metrics({"step": 4})
    file.close()
    assert steps(path) == [1, 2, 3, 4]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"WARNING: {path}: cannot be written, kept until it can: No space left on device",
        f"{path}: written again, nothing is missing",
    ]


def test_half_a_line_is_gone_on_with(tmp_path):
    class Slow:
        def __init__(self, file):
            self.file, self.room = file, 5

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            self.room -= (size := self.file.write(data[: self.room]))
            return size

    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    good, file._file = file._file, Slow(file._file)
    file.on_metrics({"step": 1})
    assert path.stat().st_size == 5
    file._file = good
    file.close()
    assert steps(path) == [1]


def test_lines_that_are_lost_in_the_end_are_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    file._file.close()
    file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    for step in (1, 2):
        file.on_metrics({"step": step})
    file.close()
    assert f"WARNING: {path}: its last 2 lines could not be written and are lost" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "kind"), [(28, RunFailed), (30, UserError)])
def test_a_file_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch, number, kind):
    def refuse(*_):
        raise OSError(number, "no")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: no") as caught:
        MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    assert type(caught.value) is kind


def test_a_callback_whose_files_cannot_be_written_is_said_once_and_spared(capsys):
    class Full(Callback):
        def on_metrics(self, metrics):
            raise OSError(28, "No space left on device", "table.json")

        on_exhibits = close = lambda self, *_: self.on_metrics({})

    spared = Spared(Full())
    spared.on_metrics({"step": 1})
    spared.on_exhibits(1, [])
    spared.close()
    said = capsys.readouterr().err
    assert said == "WARNING: Full: not everything can be written: [Errno 28] No space left on device: 'table.json'\n"
