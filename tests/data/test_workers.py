from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest

from omni_train.data import transfer, workers
from omni_train.data.workers import SIGNALS, Worker, end, start_server


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody may be there to take notice
    except psutil.NoSuchProcess:
        return True


def server() -> psutil.Process:
    start_server()
    return psutil.Process(workers._server.pid)


def _report(channel: socket.socket) -> None:
    import sys

    server = psutil.Process(os.getppid())
    report = {
        "server": server.pid,
        "threads": server.num_threads(),
        "own threads": psutil.Process().num_threads(),
        "modules": set(sys.modules),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "main": getattr(sys.modules["__main__"], "__file__", None),
    }
    transfer.send(channel, report)


def test_the_fork_server_has_imported_what_workers_need_and_runs_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_server", None)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.chdir(tmp_path)
    report = Worker(_report).receive()
    assert (report["threads"], report["own threads"]) == (1, 1)
    assert report["server"] == server().pid
    assert {"torch", "numpy", "tokenizers", "av", "soundfile", "soxr", "megatron.energon"} <= report["modules"]
    heavy = {name for name in report["modules"] if name.startswith(("megatron.core", "wandb", "deepspeed"))}
    assert not heavy
    expected = {"TOKENIZERS_PARALLELISM": "false"} | os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    for environment in (expected, report["environment"]):
        environment.pop("PYTEST_CURRENT_TEST", None)  # another one when the server began
    assert report["environment"] == expected
    assert report["folder"] == str(tmp_path)
    assert report["main"] is None  # neither pytest nor a program without a guard is imported again


def _echo(channel: socket.socket) -> None:
    while data := channel.recv(100):
        channel.send(data)


def test_signals_to_the_job_leave_the_server_alone_also_while_it_starts(monkeypatch):
    monkeypatch.setattr(workers, "_server", None)
    process = server()
    for _ in range(20):
        for number in SIGNALS:
            process.send_signal(number)
        time.sleep(0.02)
    worker = Worker(_report)
    assert worker.receive()["server"] == process.pid
    workers._server.stop()
    assert not process.is_running()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def _die(channel: socket.socket, number: int) -> None:
    workers.note("what it did")
    os.kill(os.getpid(), number)


def test_how_a_worker_ended_is_known_and_what_it_did():
    killed, well, running = Worker(_die, signal.SIGKILL), Worker(_report), Worker(_echo)
    with pytest.raises(EOFError):
        killed.receive()
    well.receive()
    with pytest.raises(EOFError):
        well.receive()
    assert killed.note == "what it did"
    assert well.note == ""
    assert end([killed, well, running]) == [-signal.SIGKILL, 0, -signal.SIGKILL]
    assert all(gone(worker.pid) for worker in (killed, well, running))


def test_an_interrupt_while_the_server_is_asked_does_not_mix_up_its_answers(monkeypatch):
    receive, interrupted = transfer.receive, []

    def interrupt(channel: socket.socket):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return receive(channel)

    running = Worker(_echo)
    monkeypatch.setattr(transfer, "receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Worker(_echo)
    assert end([running]) == [None]
    assert eventually(lambda: gone(running.pid))
    worker = Worker(_report)
    assert worker.receive()["server"] == server().pid
    with pytest.raises(EOFError):
        worker.receive()
    assert end([worker]) == [0]


def test_a_worker_that_nobody_remembers_ends():
    worker = Worker(_echo)
    worker.end.send(b"here")
    assert worker.end.recv(100) == b"here"
    pid = worker.pid
    del worker
    gc.collect()
    assert eventually(lambda: gone(pid))


def _blocked_in_writing(channel: socket.socket) -> None:
    while True:
        transfer.send(channel, np.zeros(100_000))


def _blocked_in_decoding(channel: socket.socket) -> None:
    transfer.send(channel, "begins")
    re.match("(a+)+b", 60 * "a")  # for ever, and no other thread of the process gets its turn


def _hold_workers() -> None:
    """A program: workers that do all that they can do, and then it waits."""
    mine = [Worker(function) for function in (_echo, _blocked_in_writing, _blocked_in_decoding)]
    for worker in mine[1:]:
        worker.receive()
    print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)


def test_nothing_outlives_a_process_that_is_killed():
    program = "from tests.data.test_workers import _hold_workers as go; go()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 4  # the server and the workers
    time.sleep(0.2)
    assert not any(map(gone, pids))
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in pids:
        assert eventually(lambda pid=pid: gone(pid))


def test_a_program_without_a_guard_may_load(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "print('runs')\nfrom omni_train.data.workers import Worker\n"
        "from tests.data.test_workers import _report\nprint(Worker(_report).receive()['threads'])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "runs\n1\n", "")
