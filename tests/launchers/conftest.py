"""A SLURM cluster of our own: a controller and two nodes on this machine, in a folder, gone after the tests."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import ROOT, Runs, world  # noqa: F401 (world is a fixture)

SLURM = ROOT / "launchers" / "slurm.sh"

_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
SlurmdTimeout=10
MinJobAge=3600
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=1,bf_interval=1,requeue_delay=1
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=8 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def why_not() -> str | None:
    """What is missing for a cluster on this machine."""
    if missing := [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed, see docs/slurm.md"
    return None if os.geteuid() == 0 else "slurmd starts jobs as root only"


class Cluster:
    """Two nodes, `node1` and `node2`, whose daemons can be stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "slurm.conf"
        (folder / "state").mkdir()
        host = socket.gethostname().partition(".")[0]
        self.config.write_text(_CONF.format(folder=folder, host=host, ports=_free_ports(3)))
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self.controller = self._start("slurmctld", "-D")
        self.nodes = {}
        for name in ("node1", "node2"):
            self.start_node(name)

    def start_node(self, name: str) -> None:
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self.nodes[name] = self._start("slurmd", "-D", "-N", name)

    def _start(self, *command: str) -> subprocess.Popen:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env=self.environment, start_new_session=True, **quiet)

    def ask(self, *command: str, check: bool = True) -> str:
        """What scontrol, squeue, scancel … answer."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(self) -> set[str]:
        """Of the nodes."""
        return set(self.ask("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def ranks(self) -> list[psutil.Process]:
        """The ranks that run here: those with a rank and our configuration in their environment."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == str(self.config) and "omni_train" in process.cmdline():
                    parent = process.parent()
                    if "RANK" in environment and parent is not None and "slurmstepd" in parent.name():
                        found.append((environment["RANK"], process.pid, process))
        return [process for *_, process in sorted(found)]

    def close(self) -> None:
        """Stop the daemons and whatever they have started."""
        self.ask("scancel", "--state=PENDING", "--user=root", check=False)
        started = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self.config) and process.pid != os.getpid():
                    # A slurmstepd has a title where its environment was.
                    started += [process, *(one for one in process.parents() if one.name().startswith("slurmstepd"))]
        for node in self.nodes.values():
            with contextlib.suppress(psutil.Error):
                started += psutil.Process(node.pid).children(recursive=True)
        for daemon in (*self.nodes.values(), self.controller):
            daemon.kill()
            daemon.wait()
        for process in started:
            with contextlib.suppress(psutil.Error):
                process.kill()


class Job:
    """One job of the tiny model on two nodes, one rank on each, that writes its log in the runs' folder."""

    def __init__(self, cluster: Cluster, runs: Runs) -> None:
        self.cluster, self.runs, self.id = cluster, runs, ""
        self.environment = {
            **cluster.environment,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        }

    def submit(self, *options: str, words: tuple[str, ...], direct: bool = True, cwd: Path = ROOT):
        """Submit with sbatch's options; the finished process that submitted."""
        options = ("--gpus-per-node=0", "--nodes=2", "--ntasks-per-node=1", "--mem=500", *options)
        output = f"--output={self.runs.folder}/%j.log"
        command = self.runs.command(*words)[3:]  # without python -m omni_train
        start = [SLURM, *options, output, "--"] if direct else ["sbatch", *options, output, SLURM]
        done = subprocess.run(
            [*start, *command], cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=120
        )
        if found := re.search(r"Submitted batch job (\d+)", done.stdout):
            self.id = found[1]
        return done

    @property
    def log(self) -> str:
        path = self.runs.folder / f"{self.id}.log"
        return path.read_text() if path.exists() else ""

    def shown(self, key: str) -> str:
        """A word of what SLURM says of the job."""
        found = re.search(rf"\b{key}=(\S+)", self.cluster.ask("scontrol", "show", "job", "--oneliner", self.id))
        return found[1] if found else ""

    def wait(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                daemon_log = (self.cluster.folder / "slurmctld.log").read_text()[-3000:]
                pytest.fail(f"waited too long; the job's log:\n{self.log}\nthe controller's:\n{daemon_log}")
            time.sleep(0.1)

    def is_over(self) -> bool:
        """Whether it has ended; a job that waits for its next start, as SLURM has it do for two minutes, starts now."""
        if (state := self.shown("JobState")) == "PENDING" and self.shown("Reason") == "BeginTime":
            # A start in the second of the requeue is refused ("Job credential revoked") and ends the job.
            time.sleep(2)
            self.cluster.ask("scontrol", "update", f"JobId={self.id}", "StartTime=now", check=False)
        return state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def wait_for_end(self) -> str:
        """Wait until the job is over; SLURM's word for how."""
        self.wait(self.is_over)
        return self.shown("JobState")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path: sockets are in it
    cluster = Cluster(folder)
    try:
        deadline = time.monotonic() + 60
        while cluster.states() != {"idle"}:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.2)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def job(cluster, runs) -> Iterator[Job]:
    job = Job(cluster, runs)
    yield job
    if job.id:
        cluster.ask("scancel", "--full", "--signal=KILL", job.id, check=False)
        cluster.ask("scancel", job.id, check=False)


@pytest.fixture
def runs(world, tmp_path) -> Runs:  # noqa: F811
    return Runs(world, tmp_path)


def _free_ports(count: int) -> list[int]:
    """In a row, as one line of slurm.conf wants them."""
    while True:
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            ports = [0]
            for _ in range(count):
                one = opened.enter_context(socket.socket())
                one.bind(("127.0.0.1", ports[-1] and ports[-1] + 1))
                ports.append(one.getsockname()[1])
            return ports[1:]
