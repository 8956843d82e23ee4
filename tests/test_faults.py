"""The fault run: what it counts as wrong, tried on a program that trains nothing, and one trial of the real thing."""

from __future__ import annotations

import random
import signal
import sys

import pytest

import benchmarks.faults.__main__ as faults
from benchmarks.faults import start, trial
from benchmarks.faults.chain import Fault, chain, kill, saving, send, stepping
from benchmarks.faults.trial import LONE, Layout, Trial, Wrong, make_reference

# A run as it looks from outside: metrics, checkpoints, what it says. Its argument is what is wrong with it.
PROGRAM = """
import json, pathlib, shutil, signal, subprocess, sys, time

folder, steps, flaw = pathlib.Path(sys.argv[1], "run"), int(sys.argv[2]), sys.argv[3]
checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"
checkpoints.mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
saved = sorted(checkpoints.glob("step_????????"))
newest = 0 if flaw == "silent" or not saved else int(saved[-1].name[5:])
if newest:
    print(f"resuming from {saved[-1]} at step {newest}", file=sys.stderr)
kept = metrics.read_text().splitlines(keepends=True)[:newest] if newest else []
metrics.write_text("".join(kept))
if flaw == "leaves" and newest:
    subprocess.Popen(["sleep", "60"], start_new_session=True)
for step in range(newest + 1, steps + 1):
    time.sleep(0.015)
    loss = step + (0.1 if flaw == "unequal" and newest else 0)
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss, "grad_norm": 1.0, "tokens": 7 * step}) + "\\n")
    partial = checkpoints / f"step_{step:08d}.partial"
    partial.mkdir(exist_ok=True)
    time.sleep(0.015)
    (partial / "metadata.json").touch()
    shutil.rmtree(final := checkpoints / f"step_{step:08d}", ignore_errors=True)
    partial.rename(final)
    if stopped:
        sys.exit(0 if flaw == "code" else 75)
    if flaw == "lost" and newest:
        sys.exit(0)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Have the program run where omni-train would, with the flaw that is put into the list that this gives."""
    path, flaws = tmp_path / "program.py", [""]
    path.write_text(PROGRAM)

    def command(layout: Layout, world, runs_dir) -> list[str]:
        return [sys.executable, str(path), str(runs_dir), str(layout.steps), flaws[-1]]

    monkeypatch.setattr(Layout, "command", command)
    monkeypatch.setattr(start, "GONE", 0.5)
    for made in ("write_world", "write_speech", "write_stages"):
        monkeypatch.setattr(faults, made, lambda world: None)
    return flaws


@pytest.mark.parametrize(
    ("flaw", "kind"),
    [
        ("", None),
        ("code", Wrong.end),
        ("lost", Wrong.lost),
        ("silent", Wrong.silent),
        ("leaves", Wrong.left),
        ("unequal", Wrong.unequal),
    ],
)
def test_each_kind_of_wrong_is_seen(program, tmp_path, flaw, kind):
    reference = make_reference(LONE, tmp_path, tmp_path / "untouched")
    program.append(flaw)
    run = Trial("test", "1", LONE, tmp_path, tmp_path / "trial", random.Random(1), reference)
    killed = Fault(saving, kill("group"), "killed")
    chain(run, [killed, Fault(stepping(2, 0.0), send(signal.SIGTERM, "process"), "stopped")])
    run.end()
    assert run.faults.total() == 2
    assert {wrong for wrong in Wrong if run.counts[wrong]} == ({kind} if kind else set()), run.problems


def test_a_run_of_which_something_is_wrong_is_kept_and_counted(program, tmp_path, capsys):
    words = ["--only", "kills", "--trials", "4", "--seed", "1", "--folder", str(tmp_path)]
    assert faults.main(words) == 0
    assert "| kills | 4 | 5 |" in capsys.readouterr().out
    assert not list(tmp_path.glob("omni_train_faults_*"))
    program.append("unequal")  # the run that nothing happens to never resumes
    assert faults.main(words) == 1
    (kept,) = tmp_path.glob("omni_train_faults_*/kills_01")
    assert list(kept.glob("start_*.log"))
    problem = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("WRONG"))
    assert problem.startswith("WRONG seed 1, kills 1, one process, kill -9 of ")
    assert str(kept) in problem


def test_a_result_replaces_the_one_before_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{faults.BEGIN}old\n{faults.END}below\n")
    for result in ("new\n", "newer\n"):
        faults.write(page, result)
    assert page.read_text() == f"above\n{faults.BEGIN}\nnewer\n\n{faults.END}below\n"
    assert faults.BEGIN in faults.PAGE.read_text()
    assert faults.END in faults.PAGE.read_text()


def test_a_real_run_that_is_killed_while_it_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "STEPS", 4)
    status = faults.main(["--only", "kills", "--trials", "1", "--seed", "1", "--folder", str(tmp_path)])
    assert status == 0, capsys.readouterr().err
    assert "| kills | 1 | 2 |" in capsys.readouterr().out
