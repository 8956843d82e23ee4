"""The batch script's work: start the ranks, pass signals on, and requeue the job where another try can help.

It relies on these facts of SLURM (22.05, checked by tests/launchers/test_slurm.py):

- ``scancel`` and the time limit send SIGTERM to every process of the job, this one too, and SIGKILL after ``KillWait``.
  The job is COMPLETING meanwhile, and a requeue then would bring a cancelled job back.
- ``scontrol requeue`` of the first id of an array is about the whole array.
- srun dies of a signal in its first moments, and loses one that comes before it has started the tasks. So the first is
  sent when it has had a second, and again until the tasks end; ranks heed the first.
- A node that does not answer is SLURM's to notice: it ends the job, and with ``--requeue`` queues it again by itself.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from omni_train import lines, machine
from omni_train.errors import UserError
from omni_train.processes import Exit

_RANK = """
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$0" -m omni_train "$@"
"""
_OTHERS_SECONDS = 120  # for the other ranks to end after the first one did, with whatever code
_DEAF_SECONDS = 1.0  # after the start of srun, in which it must not be sent a signal
_RESEND_SECONDS = 5.0
_TASKS_ENDED = re.compile(rb"srun: error: (\S+): tasks? (\d+)\S*: (?:Exited with exit code (\d+)|([A-Z][^(:]*))")


class StopSignals:
    """Stop signals of the batch script, from its start on: SIGUSR1 to continue later, SIGTERM to end for good."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.for_good = False
        self._ranks: subprocess.Popen | None = None
        self._deaf_until = 0.0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._asked)
        signal.signal(signal.SIGALRM, self._pass_on)

    def pass_to(self, ranks: subprocess.Popen | None) -> None:
        """Pass signals to the process of srun from here on, also one that came before; None: to no process."""
        self._ranks, self._deaf_until = ranks, time.monotonic() + _DEAF_SECONDS
        if ranks is None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        elif self.first is not None:
            self._send()

    def _send(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, self._deaf_until - time.monotonic()), _RESEND_SECONDS)

    def _asked(self, number: int, _frame: object) -> None:
        self.for_good |= number == signal.SIGTERM
        if self.first is None:
            self.first = signal.Signals(number)
            say(f"{self.first.name}: the ranks are told to save and to end")
            if self._ranks is not None:
                self._send()

    def _pass_on(self, _number: int, _frame: object) -> None:
        if self._ranks is not None:
            self._ranks.send_signal(signal.SIGUSR1)


@dataclass(frozen=True)
class End:
    """How the ranks ended.

    Attributes:
        code: exit code of the first rank that failed, 128 + n where signal n killed it; else that of all ranks.
        why: the reason, in words.
    """

    code: int
    why: str


@dataclass(frozen=True)
class Limits:
    """Limits on requeues of a job: in all, and in a row without a newer checkpoint."""

    total: int = 100
    idle: int = 3

    @classmethod
    def from_environment(cls) -> Limits:
        """Limits from the environment variables that launchers/slurm.sh documents.

        Raises:
            UserError: a variable is not a whole number.
        """
        names = {"total": "OMNI_TRAIN_REQUEUES", "idle": "OMNI_TRAIN_REQUEUES_WITHOUT_PROGRESS"}
        given = {field: os.environ[name] for field, name in names.items() if name in os.environ}
        for field, text in given.items():
            if not text.isdecimal():
                raise UserError(f"{names[field]}={text}: must be a whole number of requeues")
        return cls(**{field: int(text) for field, text in given.items()})


def run(command: Sequence[str]) -> int:
    """Run a command on the ranks of this job, and requeue the job where another try can help.

    Args:
        command: ``train`` or ``pipeline`` and its arguments.

    Returns:
        exit code of the batch script.

    Raises:
        UserError: the command cannot work.
    """
    asked = StopSignals()
    # Imported after the handlers are set: a signal that comes meanwhile counts.
    from omni_train.slurm.command import of_task, run_directory
    from omni_train.slurm.progress import Starts, steps

    env = os.environ
    job, ranks = env["SLURM_JOB_ID"], int(env["SLURM_NTASKS"])
    if task := env.get("SLURM_ARRAY_TASK_ID"):
        command, job = of_task(command, task), f"{env['SLURM_ARRAY_JOB_ID']}_{task}"
    limits = Limits.from_environment()
    directory = run_directory(command, ranks)
    starts = Starts(directory, job)
    if starts.idle > limits.idle + 1:  # SLURM itself queued it again
        starts.forget()
        say(f"given up: started {starts.idle - 1} times in a row without a newer checkpoint in {directory}")
        return Exit.failed

    say(f"start on {env['SLURM_JOB_NODELIST']} with {ranks} ranks; {directory} is {steps(directory)} steps on")
    end = _run_ranks(command, asked)
    if end.code == Exit.finished:
        starts.forget()
        say("finished")
    elif end.code != Exit.wrong and _is_ended_by_others(job, asked):
        say(f"not requeued: {end.why}; the job was cancelled, preempted or lost a node")  # then SLURM starts it again
    elif against := _against(end, starts.look(), limits) or _requeue(job):
        starts.forget()
        say(f"not requeued: {end.why}; {against}")
    else:
        progress = f"{starts.idle} of {limits.idle} without progress" if starts.idle else f"at step {steps(directory)}"
        say(f"requeued ({progress}): {end.why}")
    return end.code


def say(line: str) -> None:
    """Write a line to the job's log."""
    _write(f"{lines.stamp()}{line}\n".encode())


def _write(text: bytes) -> None:
    os.write(2, text)  # not sys.stderr: a signal's line may come in the middle of another


def _run_ranks(command: Sequence[str], asked: StopSignals) -> End:
    job = int(os.environ["SLURM_JOB_ID"]) + 997 * int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    on_this_node = int(re.match(r"\d+", os.environ["SLURM_TASKS_PER_NODE"])[0])  # as in 8(x2)
    first = os.environ["SLURMD_NODENAME"]  # where the batch script runs, and so does rank 0
    environment = {
        **machine.environment(on_this_node, int(os.environ["SLURM_CPUS_ON_NODE"])),
        "MASTER_ADDR": _show("node", first).get("NodeAddr", first),
        "MASTER_PORT": str(10000 + job % 20000),  # below the ports that systems hand out themselves
    }
    if asked.first is not None:
        return End(Exit.stopped, f"stopped by {asked.first.name} before the ranks were started")
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=0", f"--wait={_OTHERS_SECONDS}", "--cpu-bind=none"]
    ranks = subprocess.Popen(
        [*srun, "bash", "-c", _RANK, sys.executable, *command], env=environment, stderr=subprocess.PIPE
    )
    asked.pass_to(ranks)
    failure: End | None = None
    for line in ranks.stderr:
        _write(line)
        failure = failure or _failure(line)
    code = ranks.wait()
    asked.pass_to(None)
    last = End(code if code >= 0 else 128 - code, f"srun ended with {code}")
    if last.code == Exit.finished:
        return last
    if asked.first is not None and (failure is None or failure.code != Exit.wrong):
        how = "and saved" if last.code == Exit.stopped else f"and ended by {(failure or last).why}"
        return End(last.code, f"stopped by {asked.first.name}, {how}")
    if failure is None and last.code == Exit.stopped:
        return End(last.code, "the ranks were stopped by a signal, and saved")
    return failure or last


def _failure(line: bytes) -> End | None:
    """How a rank failed, if this line of srun's output says so."""
    if not (match := _TASKS_ENDED.match(line)):
        return None
    host, rank, code, killed = (part.decode() if part else "" for part in match.groups())
    who = f"rank {rank} on {host}"
    if code:
        return None if int(code) == Exit.stopped else End(int(code), f"{who} exited with code {code}")
    by = next((number for number in signal.Signals if signal.strsignal(number) == killed.strip()), None)
    return by and End(128 + by, f"{who} was killed by {by.name}")


def _against(end: End, idle: int, limits: Limits) -> str | None:
    """Reason against a requeue, or None."""
    if end.code == Exit.wrong:
        return "something given is wrong"
    if idle > limits.idle:
        return f"{limits.idle} times in a row it was, without a newer checkpoint"
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0) >= limits.total:
        return f"{limits.total} times it was"
    return None


def _is_ended_by_others(job: str, asked: StopSignals) -> bool:
    """Whether the job was cancelled or preempted, rather than ended by its time limit alone."""
    state = _show("job", job)
    if state.get("Reason") == "TimeLimit":
        return False
    return asked.for_good or state.get("JobState", "RUNNING") != "RUNNING"


def _requeue(job: str) -> str | None:
    """Requeue the job; SLURM's error, or None."""
    for _ in range(20):
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if done.returncode == 0:
            return None
        if "Unable to contact" not in done.stderr:
            break
        time.sleep(15)
    return f"scontrol requeue {job} says: {done.stderr.strip()}"


def _show(what: str, name: str) -> dict[str, str]:
    """Fields that SLURM shows of a job or node; empty where it does not answer."""
    shown = subprocess.run(["scontrol", "show", what, "--oneliner", name], capture_output=True, text=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)
