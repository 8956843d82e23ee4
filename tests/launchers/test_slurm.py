"""Runs on a real SLURM end as if nothing had happened to them; docs/slurm.md says how to have one."""

from __future__ import annotations

import signal

import pytest

from omni_train.processes import Exit
from tests.e2e.conftest import Runs
from tests.launchers.conftest import Job, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS = 120
LONG = (f"schedule.steps={STEPS}", "checkpoint.save_every=20")


def losses(runs: Runs, run: str) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["tokens"]) for m in runs.metrics(run)]


def saved(runs: Runs, run: str) -> int:
    found = (runs.folder / run / "checkpoints").glob("step_*/metadata.json")
    return max((int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdecimal()), default=0)


@pytest.fixture(scope="module")
def uninterrupted(cluster, world, tmp_path_factory) -> list[tuple]:
    """The losses of the run that nothing happens to."""
    runs = Runs(world, tmp_path_factory.mktemp("uninterrupted"))
    job = Job(cluster, runs)
    job.submit(words=("run=run", *LONG))
    assert job.wait_for_end() == "COMPLETED", job.log
    assert "| finished\n" in job.log
    history = losses(runs, "run")
    assert [step for step, *_ in history] == list(range(1, STEPS + 1))
    return history


@pytest.fixture
def training(job, runs) -> Job:
    """A job that has trained beyond step 30 of the run, and saved step 20."""
    job.submit("--time=60", "--signal=B:USR1@150", words=("run=run", *LONG))
    job.wait(lambda: len(runs.metrics("run")) >= 30 and saved(runs, "run") >= 20)
    return job


def ends_like(job: Job, uninterrupted: list[tuple]) -> None:
    assert job.wait_for_end() == "COMPLETED", job.log
    assert losses(job.runs, "run") == uninterrupted
    assert not list((job.runs.folder / "run").glob("slurm-*"))


def test_at_the_time_limit_it_saves_and_goes_on_in_the_same_job(training, uninterrupted):
    ranks = training.cluster.ranks()
    for rank in ranks:
        rank.suspend()  # SLURM looks at its clock twice a minute, in which the run would end
    training.cluster.ask("scontrol", "update", f"JobId={training.id}", "TimeLimit=3")
    training.wait(lambda: "SIGUSR1: the ranks are told" in training.log)
    for rank in ranks:
        rank.resume()
    training.wait(lambda: "| requeued (" in training.log)
    training.cluster.ask("scontrol", "update", f"JobId={training.id}", "TimeLimit=60")
    assert "stopped by SIGUSR1, and saved\n" in training.log
    assert saved(training.runs, "run") == len(training.runs.metrics("run")) > 20
    ends_like(training, uninterrupted)
    assert training.shown("Restarts") == "1"


def test_a_cancelled_job_saves_and_stays_cancelled(training, uninterrupted):
    training.cluster.ask("scancel", training.id)
    assert training.wait_for_end() == "CANCELLED"
    training.wait(lambda: "| not requeued" in training.log)
    assert training.shown("Restarts") == "0"
    assert saved(training.runs, "run") == len(training.runs.metrics("run"))
    first = training.id
    training.submit(words=("run=run", *LONG))
    assert training.id != first
    (training.runs.folder / "run" / f"slurm-{first}.json").unlink(missing_ok=True)
    ends_like(training, uninterrupted)


def test_asked_for_good_it_takes_its_time_and_is_not_requeued(training):
    training.cluster.ask("scancel", "--signal=TERM", "--batch", training.id)
    assert training.wait_for_end() == "FAILED"
    assert training.shown("ExitCode") == f"{Exit.stopped:d}:0"
    assert training.shown("Restarts") == "0"
    assert saved(training.runs, "run") == len(training.runs.metrics("run"))


def test_a_rank_killed_is_named_and_the_job_requeued(training, uninterrupted):
    training.cluster.ranks()[1].send_signal(signal.SIGKILL)
    training.wait(lambda: "| requeued (" in training.log)
    assert "rank 1 on node2 was killed by SIGKILL\n" in training.log
    ends_like(training, uninterrupted)


def test_a_signal_at_start_up_costs_nothing(job, runs, uninterrupted):
    job.submit(words=("run=run", *LONG))
    job.wait(lambda: "| start on" in job.log)
    job.cluster.ask("scancel", "--signal=USR1", "--batch", job.id)
    job.wait(lambda: "| requeued (1 of 3 without progress): stopped by SIGUSR1" in job.log)
    ends_like(job, uninterrupted)


def test_two_signals_are_no_worse_than_one(training, uninterrupted):
    for _ in range(2):
        training.cluster.ask("scancel", "--signal=USR1", "--batch", training.id)
    training.wait(lambda: "| requeued (" in training.log)
    ends_like(training, uninterrupted)


def test_a_node_that_falls_silent_is_given_up_and_the_job_requeued(training, uninterrupted):
    cluster = training.cluster
    rank = cluster.ranks()[1]
    silent = [rank, rank.parent(), cluster.nodes["node2"]]
    for process in silent:
        process.send_signal(signal.SIGSTOP)
    training.wait(lambda: "down" in " ".join(cluster.states()))
    training.wait(lambda: training.shown("Restarts") == "1")
    for process in silent:
        process.send_signal(signal.SIGKILL)
    cluster.nodes["node2"].wait()
    cluster.start_node("node2")
    ends_like(training, uninterrupted)


def test_a_wrong_recipe_is_refused_before_it_is_queued(job):
    refused = job.submit(words=("run=run", "parallel.tensor=3"))
    assert refused.returncode == Exit.wrong
    assert "not a multiple of parallel.tensor=3" in refused.stderr and refused.stderr.count("\n") == 1
    assert not job.id


def test_a_wrong_recipe_that_was_queued_is_not_queued_again(job):
    job.submit(words=("run=run", "parallel.tensor=3"), direct=False)
    assert job.wait_for_end() == "FAILED"
    assert (job.shown("ExitCode"), job.shown("Restarts")) == (f"{Exit.wrong:d}:0", "0")
    assert "not a multiple of parallel.tensor=3" in job.log and job.log.count("\n") == 1


def test_tasks_of_an_array_are_runs_of_their_own_and_requeued_one_by_one(job, runs):
    assert "run=NAME-%a" in job.submit("--array=0-1", words=("run=run",)).stderr
    both = ("--array=0-1", "--nodes=1")
    job.submit(*both, words=("run=task-%a", *LONG))  # on a node each, at the same time
    job.wait(lambda: min(len(runs.metrics(f"task-{task}")) for task in (0, 1)) >= 30)
    whole = next(rank for rank in job.cluster.ranks() if rank.environ()["SLURM_JOB_ID"] == job.id)
    other = {"0", "1"} - {whole.environ()["SLURM_ARRAY_TASK_ID"]}
    whole.send_signal(signal.SIGKILL)  # of the task whose id is that of the array
    job.wait(lambda: "| requeued (" in job.log)
    assert job.wait_for_end() == "COMPLETED"
    job.wait(lambda: not job.cluster.ask("squeue", "--noheader", "--jobs", job.id, check=False))
    assert len(runs.metrics("task-0")) == len(runs.metrics("task-1")) == STEPS
    restarts = {
        task: job.cluster.ask("scontrol", "show", "job", "--oneliner", f"{job.id}_{task}") for task in ("0", "1")
    }
    assert all(("Restarts=0" in line) == (task in other) for task, line in restarts.items())


def test_it_is_submitted_from_any_folder(job, runs, tmp_path):
    job.submit(words=("run=run", "runs_dir=here", "schedule.steps=4"), cwd=tmp_path)
    assert job.wait_for_end() == "COMPLETED", job.log
    assert (tmp_path / "here" / "run" / "checkpoints" / "step_00000004").is_dir()


def test_sbatch_from_another_folder_is_refused_at_start(job, tmp_path):
    job.submit(words=("run=run",), direct=False, cwd=tmp_path)
    assert job.wait_for_end() == "FAILED"
    assert job.shown("ExitCode") == f"{Exit.wrong:d}:0"
    assert job.log.startswith(f"error: {tmp_path}/.venv/bin/python: no such program") and job.log.count("\n") == 1
