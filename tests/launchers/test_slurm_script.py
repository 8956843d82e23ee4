"""What launchers/slurm.sh decides, with programs of our own in the place of SLURM's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from omni_train.processes import Exit
from omni_train.slurm.__main__ import main
from tests.e2e.conftest import ROOT

SLURM = ROOT / "launchers" / "slurm.sh"
TRAIN = ["train", "stage=text_pretrain", "model=tiny", "data=rehearsal"]
RUNNING = "JobState=RUNNING Reason=None"
ENDING = "JobState=COMPLETING Reason=None"
OUT_OF_TIME = "JobState=COMPLETING Reason=TimeLimit"


@dataclass
class Fakes:
    """A job on two nodes, and programs that write down what they are asked."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture

    def program(self, name: str, script: str) -> None:
        """Replace a program of SLURM by lines of bash; they may write to $calls."""
        path = self.folder / "bin" / name
        path.write_text(
            f'#!/usr/bin/env bash\nfolder={self.folder}\ncalls=$folder/calls\necho "{name} $*" >> $calls\n{script}\n'
        )
        path.chmod(0o755)

    def state(self, state: str) -> None:
        """What SLURM says of the job."""
        self.program("scontrol", f"case $2 in node) echo NodeAddr=10.0.0.1;; job) echo {state};; esac")

    def ranks(self, script: str, *words: str) -> tuple[int, str]:
        """Let the ranks be `script`, and run the batch script; its exit code, and what it and srun wrote.

        Words are those of a recipe; without, none is composed, which takes time.
        """
        self.program("srun", script)
        with self.monkeypatch.context() as patch:
            if not words:
                patch.setattr("omni_train.slurm.command.run_directory", lambda *_: self.folder / "run")
            code = main(["job", *TRAIN, f"runs_dir={self.folder}", "run=run", *words])
        return code, self.capfd.readouterr().err

    def started_again(self) -> None:
        """As SLURM starts the job once more."""
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1))

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(name)] if path.exists() else []

    def requeues(self) -> list[str]:
        return self.calls("scontrol requeue")


@pytest.fixture
def fakes(tmp_path, monkeypatch, capfd):
    (tmp_path / "bin").mkdir()
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMNI_TRAIN_"))]:
        monkeypatch.delenv(name)
    job = {"JOB_ID": "7", "NTASKS": "2", "TASKS_PER_NODE": "1(x2)", "CPUS_ON_NODE": "64", "JOB_NODELIST": "node[1-2]"}
    for name, value in {**job, "SLURMD_NODENAME": "node1", "SUBMIT_DIR": str(ROOT)}.items():
        monkeypatch.setenv(name if name.startswith("SLURM") else f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    fakes = Fakes(tmp_path, monkeypatch, capfd)
    fakes.state(RUNNING)
    yield fakes
    for number, handler in handlers.items():
        signal.signal(number, handler)


def said(err: str) -> str:
    """A line of the job's log without what stands before it."""
    return re.sub(r"^[\d-]+ [\d:]+ \S+ job \d+( restart \d+)? \| ", "", err)


def ended(how: str, code: int) -> str:
    """Ranks of which the second ends so, as srun says it; the first is killed then."""
    return f"echo 'srun: error: node2: task 1: {how}' >&2; echo 'srun: error: node1: task 0: Killed' >&2; exit {code}"


def saves(step: int) -> str:
    checkpoint = f"$folder/run/checkpoints/step_{step:08d}"
    return f"mkdir -p {checkpoint}; touch {checkpoint}/metadata.json"


CRASH = ended("Exited with exit code 1", 137)


@pytest.mark.parametrize(
    ("ranks", "code", "why"),
    [
        (ended("Killed", 137), 137, "rank 1 on node2 was killed by SIGKILL"),
        (ended("Segmentation fault (core dumped)", 139), 139, "rank 1 on node2 was killed by SIGSEGV"),
        (CRASH, 1, "rank 1 on node2 exited with code 1"),
        (ended("Exited with exit code 130", 130), 130, "rank 1 on node2 exited with code 130"),
        ("exit 75", 75, "the ranks were stopped by a signal, and saved"),
        ("kill -9 $$", 137, "srun ended with -9"),
    ],
)
def test_what_another_try_can_help_is_requeued_and_says_why(fakes, ranks, code, why):
    assert (result := fakes.ranks(ranks))[0] == code
    assert result[1].splitlines()[-1].endswith(f" job 7 | requeued (1 of 3 without progress): {why}")
    assert fakes.requeues() == ["scontrol requeue 7"]


@pytest.mark.parametrize(
    ("ranks", "code", "line"),
    [
        ("exit 0", 0, "finished"),
        (
            ended("Exited with exit code 2", 137),
            2,
            "not requeued: rank 1 on node2 exited with code 2; something given is wrong",
        ),
    ],
)
def test_what_is_done_or_wrong_is_not_requeued(fakes, ranks, code, line):
    assert (result := fakes.ranks(ranks))[0] == code
    assert f"job 7 | {line}" in result[1]
    assert not fakes.requeues()
    assert not list((fakes.folder / "run").iterdir())


def test_without_a_newer_checkpoint_it_is_requeued_three_times_in_a_row(fakes):
    for number in (1, 2):
        assert f"requeued ({number} of 3 without progress)" in fakes.ranks(CRASH)[1]
        fakes.started_again()
    assert "requeued (at step 20)" in fakes.ranks(f"{saves(20)}; {CRASH}")[1]
    for number in (1, 2, 3):
        fakes.started_again()
        assert f"requeued ({number} of 3 without progress)" in fakes.ranks(CRASH)[1]
    fakes.started_again()
    code, log = fakes.ranks(CRASH)
    assert code == 1
    assert (
        "not requeued: rank 1 on node2 exited with code 1; 3 times in a row it was, without a newer checkpoint" in log
    )
    assert len(fakes.requeues()) == 6


def test_a_checkpoint_lost_and_written_again_is_no_progress(fakes):
    fakes.ranks(f"{saves(20)}; {CRASH}")
    fakes.started_again()
    shutil.rmtree(fakes.folder / "run" / "checkpoints" / "step_00000020")
    assert "1 of 3 without progress" in fakes.ranks(f"{saves(20)}; {CRASH}")[1]


def test_starts_by_slurm_itself_count_too(fakes):
    for _ in range(4):
        fakes.ranks(CRASH)
        fakes.started_again()
    before = len(fakes.calls("srun"))
    fakes.monkeypatch.setenv("OMNI_TRAIN_REQUEUES_WITHOUT_PROGRESS", "1")
    (fakes.folder / "run" / "slurm-7.json").write_text('{"steps": 0, "idle": 2}')
    code, log = fakes.ranks("exit 0")
    assert code == Exit.failed
    assert "given up: started 2 times in a row without a newer checkpoint" in log
    assert len(fakes.calls("srun")) == before


def test_in_all_it_is_requeued_as_often_as_the_variable_says(fakes):
    fakes.monkeypatch.setenv("OMNI_TRAIN_REQUEUES", "2")
    for step in (10, 20):
        assert f"requeued (at step {step})" in fakes.ranks(f"{saves(step)}; {CRASH}")[1]
        fakes.started_again()
    assert "; 2 times it was\n" in fakes.ranks(f"{saves(30)}; {CRASH}")[1]
    fakes.monkeypatch.setenv("OMNI_TRAIN_REQUEUES", "many")
    code, err = fakes.ranks("exit 0")
    assert (code, said(err)) == (2, "error: OMNI_TRAIN_REQUEUES=many: must be a whole number of requeues\n")


UNTIL_USR1 = "trap 'exit 75' USR1; for _ in {1..600}; do sleep .1; done"


def test_slurms_signal_reaches_the_ranks_and_the_job_goes_on(fakes):
    code, log = fakes.ranks(f"kill -USR1 $PPID; {UNTIL_USR1}")
    assert code == Exit.stopped
    assert "SIGUSR1: the ranks are told to save and to end" in log
    assert "requeued (1 of 3 without progress): stopped by SIGUSR1, and saved" in log


def test_a_signal_that_srun_loses_is_sent_again(fakes):
    fakes.monkeypatch.setattr("omni_train.slurm.job._DEAF_SECONDS", 0.0)
    fakes.monkeypatch.setattr("omni_train.slurm.job._RESEND_SECONDS", 0.2)
    code, _ = fakes.ranks(f"trap : USR1; kill -USR1 $PPID; sleep .5; {UNTIL_USR1}")
    assert code == Exit.stopped


def test_a_signal_in_the_first_moments_of_srun_waits_until_it_can_be_heeded(fakes):
    code, log = fakes.ranks(f"kill -USR1 $PPID; sleep .3; {UNTIL_USR1}")
    assert code == Exit.stopped
    assert "stopped by SIGUSR1, and saved" in log


def test_after_a_signal_the_ranks_are_not_started(fakes):
    fakes.program("scontrol", "case $2 in node) kill -USR1 $PPID;; job) echo JobState=RUNNING;; esac")
    code, log = fakes.ranks(UNTIL_USR1)
    assert code == Exit.stopped
    assert "requeued (1 of 3 without progress): stopped by SIGUSR1 before the ranks were started" in log
    assert not fakes.calls("srun")


@pytest.mark.parametrize(
    ("state", "signalled", "requeued"),
    [
        (ENDING, "", False),  # scancel: the ranks have their signal from SLURM
        (ENDING, "kill -TERM $PPID;", False),
        (RUNNING, "kill -TERM $PPID;", False),  # for good, at leisure
        (OUT_OF_TIME, "kill -TERM $PPID;", True),
    ],
)
def test_a_job_that_somebody_ends_is_not_brought_back(fakes, state, signalled, requeued):
    fakes.state(state)
    code, log = fakes.ranks(f"trap : USR1; {signalled} sleep .3; exit 75")
    assert code == Exit.stopped
    assert bool(fakes.requeues()) is requeued
    assert ("| not requeued: " in log) is not requeued


def test_a_refused_requeue_is_told(fakes):
    fakes.program("scontrol", "case $1 in show) echo JobState=RUNNING;; *) echo 'disabled' >&2; exit 1;; esac")
    assert "exited with code 1; scontrol requeue 7 says: disabled\n" in fakes.ranks(CRASH)[1]


def test_the_ranks_have_what_they_need(fakes):
    fakes.monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code, _ = fakes.ranks(
        'shift 6; export SLURM_PROCID=1 SLURM_LOCALID=0; echo "$*" >> $calls; set -- bash -c "${1/exec*/env}" ;'
        ' "$@" | grep -E "^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER|OMP)" >> $calls'
    )
    assert code == 0
    seen = (fakes.folder / "calls").read_text()
    for word in (
        "RANK=1",
        "WORLD_SIZE=2",
        "LOCAL_RANK=0",
        "MASTER_ADDR=10.0.0.1",
        "MASTER_PORT=10007",
        "OMP_NUM_THREADS=64",
    ):
        assert f"\n{word}\n" in seen


def test_an_array_names_the_task_and_requeues_it_alone(fakes):
    fakes.monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    fakes.monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    code, err = fakes.ranks("exit 0")
    assert (code, said(err)) == (
        2,
        "error: run= must differ between an array's jobs: give run=NAME-%a, %a being the task's number\n",
    )
    assert not fakes.calls("srun")
    fakes.ranks(CRASH, "run=of-%a", "seed=%a")
    assert " run=of-3 seed=3\n" in (fakes.folder / "calls").read_text()
    assert fakes.requeues() == ["scontrol requeue 5_3"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel.tensor=2", "parallel.pipeline=2"], "error: parallel."),
        (["--multirun", "seed=1,2"], "error: --multirun: must be left out under SLURM"),
    ],
)
def test_what_cannot_work_is_refused_before_srun(fakes, words, line):
    code, err = fakes.ranks("exit 0", *words)
    assert code == Exit.wrong
    assert said(err).startswith(line) and err.count("\n") == 1
    assert not fakes.calls("srun")


def test_a_pipeline_has_the_steps_of_its_stages_behind_it(fakes):
    for path in ("run/one/checkpoints/step_00000010", "run/two/checkpoints/step_00000004"):
        (fakes.folder / path).mkdir(parents=True)
        (fakes.folder / path / "metadata.json").touch()
    fakes.program("srun", "exit 0")
    (fakes.folder / "two.yaml").write_text("all: [model=tiny]\nstages: {one: [stage=text_pretrain]}\n")
    assert main(["job", "pipeline", f"name={fakes.folder}/two.yaml", "run=run", f"runs_dir={fakes.folder}"]) == 0
    assert f"{fakes.folder}/run is 14 steps on" in fakes.capfd.readouterr().err


def submitted(fakes: Fakes, *arguments: str, script: Path = SLURM, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    fakes.program("sbatch", 'echo "$OMNI_TRAIN_PYTHON" >> $calls')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_it_submits_itself_from_any_folder(fakes, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node", "2", "-p", "big"]
    done = submitted(fakes, *options, "--", *TRAIN, "parallel.tensor=4", "run=x", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert fakes.calls("sbatch") == [f"sbatch {' '.join([*options, str(SLURM), *TRAIN])} parallel.tensor=4 run=x"]
    assert f"\n{ROOT}/.venv/bin/python\n" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes=3", "--ntasks-per-node=1", "--", *TRAIN, "parallel.tensor=2"], "error: parallel"),
        (["--array=0-3", "--", *TRAIN, "run=one"], "error: run= must differ between an array's jobs"),
        (TRAIN, "error: -- must come before the command"),
        (["--nodes", "--", *TRAIN], "error: options of sbatch: argument -N/--nodes: expected one argument"),
        (["--", "data", "pack"], "error: data: must be train or pipeline under launchers/slurm.sh"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_queued(fakes, arguments, line):
    done = submitted(fakes, *arguments)
    assert done.returncode == Exit.wrong
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not fakes.calls("sbatch")


def test_there_is_no_other_python_than_that_named(fakes, tmp_path):
    copy = shutil.copy(SLURM, tmp_path / "slurm_script")  # as SLURM does
    fakes.monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    done = subprocess.run([copy, *TRAIN], capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.wrong
    assert (
        done.stderr.startswith(f"error: {tmp_path}/.venv/bin/python: no such program") and done.stderr.count("\n") == 1
    )
    fakes.monkeypatch.setenv("OMNI_TRAIN_PYTHON", sys.executable)
    fakes.monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run([copy, "data"], capture_output=True, text=True, timeout=60)
    assert said(done.stderr) == "error: data: must be train or pipeline under launchers/slurm.sh\n"


@pytest.mark.parametrize("name", ["local.sh", "gpu_check.sh"])
def test_the_other_launchers_have_no_other_python_either(tmp_path, name):
    (tmp_path / "launchers").mkdir()
    script = shutil.copy(ROOT / "launchers" / name, tmp_path / "launchers" / name)
    environment = {name: value for name, value in os.environ.items() if name != "OMNI_TRAIN_PYTHON"}
    done = subprocess.run([script, "1", "train"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.wrong
    assert (
        done.stderr.startswith(f"error: {tmp_path}/.venv/bin/python: no such program") and done.stderr.count("\n") == 1
    )
    environment["OMNI_TRAIN_PYTHON"] = "/bin/true"
    assert subprocess.run([script, "1", "train"], env=environment, timeout=60).returncode == (0)
