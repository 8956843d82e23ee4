from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection

import psutil
import pytest

from omni_train.processes import fork_server


def _report(connection: Connection) -> None:
    connection.send((psutil.Process(os.getppid()).num_threads(), "numpy" in sys.modules))


def _threads_of_the_server(module: str) -> None:
    """A program, for a process has but one such server."""
    context = fork_server(module)
    ours, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs,))
    process.start()
    print(*ours.recv())
    process.join()


@pytest.mark.parametrize("module", ["data_pipelines.pack", "data_pipelines.rehearsal.kinds"])
def test_what_makes_data_is_forked_from_a_process_without_threads(module):
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = f"from tests.test_processes import _threads_of_the_server as go; go({module!r})"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1 True\n", "")
