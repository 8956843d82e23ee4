"""Lock of a directory, for one command at a time on all machines of a cluster. Imports nothing heavy.

Locks of the kernel (flock, fcntl) do not hold on every NFS or Lustre, so the lock is a file that only one can create,
renewed by its holder every few seconds. Whether a holder on another machine still lives is seen by watching the file,
never by comparing clocks; on the same machine its process is looked up, and of the same SLURM job started again it is
known to have ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omni_train import lines
from omni_train.errors import UserError, cannot_write

HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 1.0
SILENT_POLLS = 60
"""Polls of an unchanged lock before its holder counts as ended. Polls, not seconds: while the file system hangs, no
holder can renew its lock, and no one polls."""

_NAME = ".lock"


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock, as it is written into the lock."""

    token: str  # unique to this lock
    host: str
    kernel: str  # boot and process namespace within which `pid` means something, "" where that is not known
    pid: int
    started: str  # of the process, since another may get its number
    job: str | None  # SLURM's
    restart: int  # of the job, how often it was started again
    since: str  # for people

    @classmethod
    def here(cls) -> Holder:
        """Description of this process as a holder."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            kernel=_kernel(),
            pid=os.getpid(),
            started=_started(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    def alive(self, asking: Holder) -> bool | None:
        """Whether the holder still runs, as far as the asking process can know; None where only watching tells."""
        if self.job and self.job == asking.job and self.restart < asking.restart:
            return False
        if self.kernel and self.kernel == asking.kernel:
            return _started(self.pid) == self.started
        return None

    def __str__(self) -> str:
        job = f"SLURM job {self.job}, start {self.restart + 1}; " if self.job else ""
        return f"process {self.pid} on {self.host} ({job}since {self.since})"


class DirectoryLock:
    """Lock of a directory, held by one process at a time: a context manager, or to :meth:`acquire` and :meth:`release`.

    Args:
        directory: the directory, made where it is missing.
        remedy: what the user can do where another process holds the lock, beside waiting for it.
    """

    def __init__(self, directory: Path, remedy: str) -> None:
        self.directory, self.remedy = directory, remedy
        self.path = directory / _NAME
        self._me: Holder | None = None
        self._stop = threading.Event()

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Take the lock, also from a holder that has ended without releasing it.

        Where only watching tells whether the holder lives, this takes up to a minute. A lock that is refused is left
        as it is.

        Args:
            waiting: function that is called about every second meanwhile.

        Raises:
            UserError: another process holds it, named in one line; or the directory cannot be written to.
        """
        me, blocked = Holder.here(), 0
        try:
            self._made = not self.directory.exists()
            self.directory.mkdir(parents=True, exist_ok=True)
            while not self._create(me):
                if (content := self._read()) is None:
                    continue  # released a moment ago
                holder = _parsed(content)
                alive = holder.alive(me) if holder else None
                if alive is None:
                    alive = not self._is_silent(content, holder, waiting)
                    if alive and _token(self._read()) != _token(content):
                        continue  # another process has it by now
                if alive:
                    raise UserError(
                        f"{self.directory}: {holder} is at work here; wait for it, stop it, or {self.remedy}"
                    )
                if self._remove(_token(content)):
                    lines.write(
                        f"{self.directory}: {holder or 'who was here'} has ended without a word; this goes on instead"
                    )
                else:  # another command does the same
                    waiting()
                    time.sleep(POLL_SECONDS / 10)
                    blocked += 1
                    if blocked > 10 * SILENT_POLLS:  # that command was killed meanwhile
                        self._claim(_token(content)).unlink(missing_ok=True)
                        blocked = 0
        except OSError as error:
            raise cannot_write(self.directory, error) from error

    def check(self) -> None:
        """Check that the lock is still held, before something is written.

        Raises:
            UserError: another process took it over, because this one was suspended for long, or it was removed.
        """
        if self._me is None or _token(content := self._read()) == self._me.token:
            return
        other = content and _parsed(content)
        by = f"{other} took over" if other else f"{self.path.name} was removed"
        raise UserError(f"{self.directory}: {by} while process {self._me.pid} was at work here; this one ends")

    def release(self) -> None:
        """Release the lock, where this process still holds it."""
        if self._me is None:
            return
        self._stop.set()
        self._thread.join(HEARTBEAT_SECONDS)
        with contextlib.suppress(OSError):
            self._remove(self._me.token)
            if self._made:
                self.directory.rmdir()  # which fails where it is not empty
        self._me = None

    def _create(self, me: Holder) -> bool:
        """Create the lock of this process; False where there is one already."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        content = json.dumps(asdict(me)).encode() + b"\n"
        try:
            os.write(file, content)
            os.fsync(file)
        except OSError:
            os.close(file)
            self.path.unlink()
            raise
        self._me = me
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, args=(file, len(content)), daemon=True)
        self._thread.start()
        return True

    def _beat(self, file: int, offset: int) -> None:
        """Renew the lock in this process's own file, even where another process has replaced it."""
        for beat in itertools.count():
            if self._stop.wait(HEARTBEAT_SECONDS):
                break
            with contextlib.suppress(OSError):  # the next one may succeed; `check` tells what is lost
                os.pwrite(file, b"%012d\n" % beat, offset)
                os.fsync(file)
        os.close(file)

    def _is_silent(self, content: bytes, holder: Holder | None, waiting: Callable[[], None]) -> bool:
        """Whether a lock is not renewed for long."""
        for look in range(SILENT_POLLS):
            if look == 1:
                seconds = round(SILENT_POLLS * POLL_SECONDS)
                lines.write(
                    f"{self.directory}: {holder or 'somebody'}: waiting for a sign of life, {seconds} s at most"
                )
            waiting()
            time.sleep(POLL_SECONDS)
            if self._read() != content:
                return False
        return True

    def _remove(self, token: str) -> bool:
        """Remove the lock of a token. Two processes never do at once: the second would remove the next holder's.

        Returns:
            False where another process is removing it.
        """
        claim = self._claim(token)
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        if _token(self._read()) == token:
            self.path.unlink()
        claim.unlink(missing_ok=True)
        return True

    def _claim(self, token: str) -> Path:
        return self.path.with_name(f"{_NAME}.{token}")

    def _read(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None


def _parsed(content: bytes) -> Holder | None:
    """Holder that a lock names; None where it is just being written, or damaged."""
    try:
        holder = Holder(**json.loads(content.splitlines()[0]))
        # It becomes part of a file's name, and of a line.
        whole = re.fullmatch("[0-9a-f]{16}", holder.token) and str(holder).isprintable()
        whole = whole and isinstance(holder.pid, int) and isinstance(holder.restart, int)
    except (ValueError, IndexError, TypeError):
        return None
    return holder if whole else None


def _token(content: bytes | None) -> str:
    """Token of a lock; empty where there is none."""
    if content is None:
        return ""
    holder = _parsed(content)
    return holder.token if holder else hashlib.sha256(content).hexdigest()[:16]


def _kernel() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Time at which a process of this machine started, in the kernel's ticks; None where it does not run."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else numbers[18]  # a zombie only waits to be counted
