"""Lock of a run's directory, for one run at a time: the first rank holds it, and all ranks know whether it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omni_train import platform
from omni_train.errors import UserError, announce
from omni_train.locks import DirectoryLock
from omni_train.platform.agreement import on_first_rank, wait_on


class RunLock:
    """Locks of directories, which the first rank holds for all ranks."""

    def __init__(self, locks: list[DirectoryLock]) -> None:
        self._locks = locks

    def check(self) -> None:
        """Check that the locks are still held, before something is written. Collective.

        Raises:
            UserError: on all ranks, as :meth:`omni_train.locks.DirectoryLock.check` says.
        """

        def check_all() -> None:
            for lock in self._locks:
                lock.check()

        on_first_rank(check_all)


@contextmanager
def holding(*directories: Path, remedy: str, when_held: Callable[[], None] = lambda: None) -> Iterator[RunLock]:
    """Hold the locks of directories, all or none. Collective; joins the other ranks for it where they have not met.

    Args:
        directories: directories to lock, made where they are missing.
        remedy: what the user can do where another process holds a lock, beside waiting for it.
        when_held: called on the first rank before any rank goes on; what it raises, all raise.

    Raises:
        UserError: on all ranks, as :meth:`omni_train.locks.DirectoryLock.acquire` says.
    """
    locks = [DirectoryLock(directory, remedy) for directory in directories]
    with ExitStack() as held:

        def acquire() -> None:
            for lock in locks:
                # While it waits, so do the others, in collectives that have their own time limits.
                lock.acquire(waiting=wait_on)
                held.callback(lock.release)
            when_held()

        with platform.joined():
            try:
                on_first_rank(acquire)
            except UserError as error:
                announce(error)  # while the ranks can still agree on who prints it
                raise
        yield RunLock(locks)
