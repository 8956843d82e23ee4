"""Worker processes of the loader, forked by a server that has imported what they need and runs no thread of its own.

A process that trains has threads (of OpenMP, gloo, NCCL, CUDA, FFmpeg). A process forked from it has none of them, but
whatever they held at that moment, and waits for ever where it needs one of them. So each process that loads starts one
fork server, a new program, which it shares among its loaders; the server forks a worker when it is asked to, and says
how it ended. The server ends with the process that started it, and the workers with the server, however that ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Collection
from typing import Any

from omni_train.data import transfer
from omni_train.processes import die_with_parent

# They go to the whole job, to ask it to stop; the training process decides when its workers end.
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
END_SECONDS = 5.0  # that a killed worker may take to end: one that waits for a lost disk does not
NOTE_BYTES = 1024


class Worker:
    """Worker process that runs ``function(end, *arguments)``, where ``end`` is its end of a channel (``transfer``).

    Args:
        function: importable by name; like its arguments, it is pickled.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.end, theirs = transfer.channel()
        weakref.finalize(self, self.end.close)  # which ends a worker that nobody remembers
        memory = os.memfd_create("omni_train", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, NOTE_BYTES)
            self._note = mmap.mmap(memory, NOTE_BYTES)
            job = pickle.dumps((function, arguments, os.getcwd()))
            self.pid: int = _ask(job, theirs.fileno(), memory)
        finally:
            theirs.close()
            os.close(memory)

    def receive(self) -> Any:
        """Next object that the worker sent.

        Raises:
            EOFError: the worker has ended.
            RuntimeError: the worker raised an error, whose stack trace is the message.
        """
        value, _ = transfer.receive(self.end)
        if isinstance(value, _Raised):
            raise RuntimeError(f"in a worker process:\n{value.trace}")
        return value

    @property
    def note(self) -> str:
        """Last text that the worker gave to ``note``, also when it has died."""
        return bytes(self._note).split(b"\0", 1)[0].decode(errors="replace")


def end(workers: Collection[Worker]) -> list[int | None]:
    """Kill workers at once, whatever they are doing.

    Returns:
        their exit codes, -n for those that signal n had killed before; None where it is not known.
    """
    try:
        # Without a server there is no worker either.
        return _ask([worker.pid for worker in workers]) if workers and _server else [None for _ in workers]
    finally:
        for worker in workers:
            worker.end.close()  # not before: a worker that reads from it would end by itself


_noted: mmap.mmap | None = None


def note(text: str) -> None:
    """Note what this worker is doing, for the message should it die; does nothing in other processes."""
    if _noted is not None:
        data = text.encode(errors="replace")[: NOTE_BYTES - 1] + b"\0"
        _noted[: len(data)] = data


_lock = threading.Lock()
_server: _Server | None = None


def start_server() -> None:
    """Start this process's fork server unless it runs; its imports take seconds, in the background."""
    global _server
    with _lock:
        _server = _server or _Server()


def _ask(request: Any, *descriptors: int) -> Any:
    """Answer of the fork server to a request; from a new server where the old one was killed."""
    global _server
    with _lock:
        for _ in range(2):
            _server = _server or _Server()
            try:
                transfer.send(_server.end, request, *descriptors)
                return transfer.receive(_server.end)[0]
            except BaseException as error:  # an interrupt, too: the answer would be taken for the next one's
                _server.stop()
                _server = None
                if not isinstance(error, (EOFError, BrokenPipeError, ConnectionResetError)):
                    raise
    raise RuntimeError("the fork server of the loader's workers does not start; it says why above")


class _Server:
    """Handle of the fork server in the process that started it."""

    def __init__(self) -> None:
        self.end, theirs = transfer.channel()
        # Imported by name, because a program of one's own without a guard (`if __name__ == "__main__"`) must not be.
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"import omni_train.data.stream.loader\nfrom omni_train.data.workers import serve\nserve({theirs.fileno()})"
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it ignores them itself
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.pid = process.pid
        self.stop = weakref.finalize(self, _stop, process, self.end)


def _environment() -> dict[str, str]:
    # NumPy's OpenBLAS would start threads when it is imported, and again in every worker; those are the parallelism.
    return {"TOKENIZERS_PARALLELISM": "false", **os.environ, "OPENBLAS_NUM_THREADS": "1"}


def _stop(process: subprocess.Popen, end: socket.socket) -> None:
    end.close()
    process.kill()
    process.wait()


def serve(descriptor: int) -> None:
    """Run as the fork server of the process at the other end of a channel, until that process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    server, alive = socket.socket(fileno=descriptor), set()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request, descriptors = transfer.receive(server)
            if descriptors:
                answer = _fork(server, request, *descriptors)
                alive.add(answer)
            else:
                pids = [pid for pid in request if pid in alive]
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                codes = {pid: _wait(pid) for pid in pids}
                alive -= {pid for pid, code in codes.items() if code is not None}
                answer = [codes.get(pid) for pid in request]
            transfer.send(server, answer)


def _wait(pid: int) -> int | None:
    deadline = time.monotonic() + END_SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def _fork(server: socket.socket, job: bytes, channel: int, memory: int) -> int:
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(channel)
        os.close(memory)
        return pid
    end = socket.socket(fileno=channel)  # open until this process ends, so that its exit code is known by then
    try:
        die_with_parent(parent)
        server.close()
        _run(job, end, memory)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class _Raised:
    """Error of a worker, as it is sent to the process that it works for."""

    def __init__(self, trace: str) -> None:
        self.trace = trace


def _run(job: bytes, end: socket.socket, memory: int) -> None:
    global _noted
    faulthandler.enable()  # a decoder that crashes says where
    try:
        _noted = mmap.mmap(memory, NOTE_BYTES)
        function, arguments, folder = pickle.loads(job)
        os.chdir(folder)
        function(end, *arguments)
    except Exception:
        with contextlib.suppress(OSError):  # the process that we work for has gone
            transfer.send(end, _Raised(traceback.format_exc()))
