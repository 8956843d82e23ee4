"""Whole runs of the command line, each in processes of its own, on a small world made once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.tiny_runs import thinker, write_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with shards ``text`` and a ``tokenizer``."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@dataclass
class Runs:
    """Starts runs of a tiny model on the world; each test has a folder of its own."""

    world: Path
    folder: Path
    encoders: bool = False  # a model that hears and sees takes longer to start and to train

    def command(self, *overrides: str, ranks: int = 1) -> list[str]:
        words = [
            "train",
            *thinker(self.world, encoders=self.encoders),
            f"runs_dir={self.folder}",
            "schedule.steps=12",
            "checkpoint.save_every=4",
            *overrides,
        ]
        if ranks > 1:
            return [str(ROOT / "launchers" / "local.sh"), str(ranks), *words]
        return [sys.executable, "-m", "omni_train", *words]

    def start(self, *overrides: str, ranks: int = 1) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            self.command(*overrides, ranks=ranks),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, *overrides: str, ranks: int = 1, status: int = 0) -> str:
        """Run to the end; standard error, after the exit status was checked."""
        process = self.start(*overrides, ranks=ranks)
        try:
            out, err = process.communicate(timeout=180)
        finally:
            kill(process)
        assert process.returncode == status, err + out
        return err

    def metrics(self, run: str) -> list[dict]:
        path = self.folder / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait(self, condition, process: subprocess.Popen, seconds: float = 150) -> None:
        """Wait until `condition()` holds while the process lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None:
                pytest.fail(f"the run ended early: {process.communicate()[1]}")
            assert time.monotonic() < deadline, "the run did not get there in time"
            time.sleep(0.002)


def kill(process: subprocess.Popen) -> None:
    """kill -9 the run and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def runs(world, tmp_path) -> Runs:
    return Runs(world, tmp_path)
