"""Sweeps by a launcher plugin of Hydra's: which words choose it, and how its jobs end."""

from __future__ import annotations

import pytest

from omni_train import lines, stopping
from omni_train.errors import UserError
from omni_train.processes import Exit
from omni_train.recipe import hydra_app, sweep
from omni_train.recipe.sweep import Launcher, split


@pytest.fixture(autouse=True)
def jobs(tmp_path, monkeypatch):
    """A folder where each job leaves its words; a job ends with its seed, those from 200 on by that signal less 200."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(stopping, "_doing", None)  # as these are afterwards
    monkeypatch.setattr(lines, "_in_a_run", False)
    (tmp_path / "jobs").mkdir()
    script = """for word; do case $word in seed=*) code=${word#seed=};; run=*) run=${word#run=};; esac; done
        echo "$@" > jobs/${run##*/}; [ $code -lt 200 ] || kill -$((code - 200)) $$; exit $code"""
    monkeypatch.setattr(sweep, "_PROGRAM", ("sh", "-c", script, "job"))
    return tmp_path / "jobs"


def run(*words: str) -> int:
    return hydra_app.run("omni-train train", ["--multirun", "run=all", *words], job=pytest.fail)


@pytest.mark.parametrize(
    ("seeds", "code"),
    [("0,2,0", Exit.wrong), ("0,0", Exit.finished), ("2,1,0", 1), ("2,209,0", 137), ("75,1,0", Exit.stopped)],
)
def test_every_job_of_joblib_runs_and_the_worst_exit_code_is_the_sweeps(jobs, seeds, code, capsys):
    assert run("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"seed={seeds}") == code
    seeds = seeds.split(",")
    assert {int(job.name): job.read_text() for job in jobs.iterdir()} == {
        number: f"seed={seed} run=all/{number}\n" for number, seed in enumerate(seeds)
    }
    said = capsys.readouterr().err
    for number, seed in enumerate(seeds):
        assert (f"all/{number}: ended with exit code {seed.replace('209', '137')} (omni" in said) == (seed != "0")


def test_a_job_has_the_folder_of_recipes_that_the_sweep_has(jobs, tmp_path):
    (tmp_path / "own" / "schedule").mkdir(parents=True)
    (tmp_path / "own" / "schedule" / "mine.yaml").write_text("steps: 23\nglobal_batch: 4\n")
    assert run("hydra/launcher=joblib", "--config-dir", "own", "schedule=mine", "seed=0") == Exit.finished
    assert (jobs / "0").read_text() == "schedule=mine seed=0 run=all/0 --config-dir own\n"


def test_words_for_the_launcher_are_told_from_those_for_the_recipe():
    words = ["hydra/launcher=joblib", "seed=1,2", "hydra.launcher.n_jobs=2"]
    assert split(words) == (Launcher("joblib", (words[0], words[2])), ["seed=1,2"])
    assert split(["seed=1", "hydra.sweep.dir=x"]) == (Launcher("basic", ()), ["seed=1", "hydra.sweep.dir=x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["hydra/launcher=nosuch_slurm"],
            "hydra/launcher=nosuch_slurm: not installed; pip install hydra-nosuch-",
        ),
        (["hydra/launcher=joblib", "hydra/launcher=basic"], "hydra/launcher=basic: the launcher is joblib already"),
        (["hydra.launcher.n_jobs=2"], "hydra.launcher.n_jobs=2: basic has no settings"),
        (["hydra/launcher=joblib", "hydra.launcher.nosuch=2"], "hydra/launcher=joblib: Could not override"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=x"], "hydra/launcher=joblib: "),
        (["hydra/launcher=joblib", "hydra.sweep.dir=x"], "hydra.sweep.dir=x: Hydra composes recipes here"),
        (["hydra/launcher=joblib", "parallel.tensor=2"], "parallel.tensor=2: needs 2 processes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_the_first_job(jobs, words, message):
    with pytest.raises(UserError) as error:
        run("seed=0", *words)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not list(jobs.iterdir())


def test_several_processes_cannot_share_a_launcher(jobs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^hydra/launcher=joblib: every job is a process of its own"):
        run("hydra/launcher=joblib", "seed=0")
    assert not list(jobs.iterdir())
