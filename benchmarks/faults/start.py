"""Start of a command: its processes, wherever they went, and its end."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MARK = "OMNI_TRAIN_FAULTS"  # a variable that every process of a start inherits
LAUNCHER = "launch"  # a word of its command line
PATIENCE = 240.0  # seconds that anything may take before it counts as hanging
GONE = 10.0  # seconds after the end of a command by which its processes must have ended


class Hangs(Exception):
    """Error of something that took longer than anything may."""


class Start:
    """Command that has been started in a session of its own; its output goes into the file ``log``.

    Args:
        before: state of the trial before the start.
        terminal: whether it has a pseudo-terminal of its own, as for a person.
    """

    def __init__(self, command: list[str], log: Path, *, before: Any = None, terminal: bool = False) -> None:
        self.before = before
        self._mark, self._log, self._keyboard = uuid.uuid4().hex, log, -1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self._mark}
        log.touch()
        with contextlib.ExitStack() as files:
            if terminal:
                self._keyboard, end = pty.openpty()
                files.callback(os.close, end)
                streams = dict.fromkeys(("stdin", "stdout", "stderr"), end)
                command = ["setsid", "--ctty", *command]  # the process itself, with the terminal as its own
                threading.Thread(target=self._listen, daemon=True).start()
            else:
                out = files.enter_context(log.open("wb"))
                streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=not terminal, **streams
            )

    def _listen(self) -> None:
        with self._log.open("wb", buffering=0) as log, contextlib.suppress(OSError):  # raised when nobody has it open
            while said := os.read(self._keyboard, 4096):
                log.write(said)

    def type(self, keys: bytes) -> None:
        """Type on the start's terminal."""
        os.write(self._keyboard, keys)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def warned(self, part: str = "") -> bool:
        """Whether a warning was printed that contains a text."""
        return any("WARNING" in line and part in line for line in self.said.splitlines())

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False where the command ended before.

        Raises:
            Hangs: neither happens.
        """
        deadline = time.monotonic() + PATIENCE
        while not reached():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Hangs(f"did not get there in {PATIENCE:.0f} s")
            time.sleep(0.004)
        return True

    def exit_code(self) -> int:
        """Exit code after the end of the command, as a shell has it: 128 + n where signal n killed it.

        Raises:
            Hangs: it does not end.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Hangs(f"did not end in {PATIENCE:.0f} s") from None
        return code if code >= 0 else 128 - code

    def ranks(self) -> list[psutil.Process]:
        """Processes that train: the one started, or the launcher's children."""
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(self.process.pid)
            if LAUNCHER in started.cmdline():
                return sorted(started.children(), key=lambda rank: rank.pid)
            return [started]
        return []

    def processes(self) -> list[psutil.Process]:
        """All living processes of the command, whatever became of their parents."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                    found.append(process)
        return found

    def left(self) -> list[str]:
        """Command lines of processes that live on after the end, which are then killed."""
        deadline = time.monotonic() + GONE
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                names.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        self.kill()
        return names

    def kill(self) -> None:
        """Send kill -9 to every process of the command, as if its node went down."""
        while alive := self.processes():
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)

    def opened(self, part: str) -> bool:
        """Whether a rank has a file or a socket open whose name contains a text."""
        for rank in self.ranks():
            for descriptor in _listed(f"/proc/{rank.pid}/fd"):
                with contextlib.suppress(OSError):
                    if part in os.readlink(descriptor):
                        return True
        return False

    def loaded(self, library: str) -> bool:
        """Whether a rank has loaded a shared library."""
        for rank in self.ranks():
            with contextlib.suppress(OSError):
                if library in Path(f"/proc/{rank.pid}/maps").read_text():
                    return True
        return False


def _listed(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [entry.path for entry in os.scandir(folder)]
    return []
