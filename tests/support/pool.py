"""Worker processes that run a function on several ranks, kept alive between calls.

Starting a process and importing torch and Megatron costs seconds; a call on living workers costs milliseconds. This
module imports torch only where it is used, so that a worker's environment is set first.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_WORLD_SIZE = 8

GRACE_SECONDS = 10.0
"""How long the other ranks may go on after one failed: they usually fail at once, on its closed connections."""


class RankFailed(Exception):
    """A rank raised, died or hung. The message names the rank and carries its traceback."""


class WorkerPool:
    """Up to ``MAX_WORLD_SIZE`` processes, started on demand; each call joins the first ``world_size`` by gloo."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` on every rank and return the results in rank order.

        Raises:
            RankFailed: a rank raised, died, or had not answered after ``timeout`` seconds.
            ValueError: the world size is out of range.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size={world_size}: the test pool has 1 to {MAX_WORLD_SIZE} workers")
        while len(self._workers) < world_size:
            self._workers.append(_start(len(self._workers)))
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, connection) in enumerate(self._workers[:world_size]):
                call = (rank, world_size, str(Path(folder, "store")), timeout, function, args)
                try:
                    connection.send_bytes(_pack(call))
                except OSError:  # it died between calls
                    self.close()
                    raise RankFailed(f"the worker of rank {rank} was dead before the call") from None
            return self._collect(world_size, timeout)

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        pending = dict(enumerate(self._workers[:world_size]))
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        while pending:
            # The sentinel is beside the connection because a worker's own children may hold the connection open.
            handles = [handle for process, connection in pending.values() for handle in (connection, process.sentinel)]
            ready = wait(handles, max(0.0, deadline - time.monotonic()))
            if not ready:
                if not failures:
                    failures.append(f"ranks {sorted(pending)} of {world_size} had not answered after {timeout:g} s")
                self.close()
                break
            for rank, (process, connection) in list(pending.items()):
                if connection not in ready and process.sentinel not in ready:
                    continue
                del pending[rank]
                try:
                    succeeded, value = _unpack(connection.recv_bytes())
                except (EOFError, OSError):
                    process.join()
                    succeeded, value = False, f"the worker died with exit code {process.exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank} of {world_size}: {value}")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            if any(not process.is_alive() for process, _ in self._workers):
                self.close()
            raise RankFailed("\n".join(failures))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """Kill all workers, and whatever they started. The next call starts new ones."""
        for process, connection in self._workers:
            connection.close()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()
        self._workers.clear()


def _start(index: int) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not a daemon: saving a distributed checkpoint starts processes of its own.
    process = context.Process(target=_work, args=(theirs,), name=f"rank-{index}", daemon=False)
    process.start()
    theirs.close()
    return process, ours


def _work(connection: Connection) -> None:
    """A worker's life: calls come in and answers go out until the other end closes."""
    os.setsid()  # so that its own children can be killed with it
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pool tests the CPU platform, also on a machine with GPUs
    threading.Thread(target=_die_with_parent, daemon=True).start()

    import torch

    from omni_train.platform import cpu_streams

    torch.set_num_threads(1)
    cpu_streams.strict = True  # a wait that is missing fails here, as it would on a GPU
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = _pack((True, _run_one(call)))
        except BaseException as error:  # also SystemExit, as the command line raises it
            # Answered before the process group goes, so that the first failure to arrive is the cause of the others.
            connection.send_bytes(_pack((False, _describe(error))))
            _leave()
        else:
            _leave()
            connection.send_bytes(answer)


def _run_one(call: bytes) -> Any:
    rank, world_size, store_path, timeout, function, args = _unpack(call)
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from omni_train import platform

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.manual_seed(0)
    platform.setup()
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    result = function(rank, world_size, *args)
    dist.barrier()  # nobody closes its connections while another still needs them
    return result


def _leave() -> None:
    """Forget this call's process groups, so that the next may use another layout."""
    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    # What a model refers to in a circle keeps its groups alive, whose threads spin once the other end has gone.
    gc.collect()


def _describe(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def _pack(value: Any) -> bytes:
    """Pickled by torch, because Megatron replaces plain pickle's way to load a tensor with one that needs Megatron."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)
