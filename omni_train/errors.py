"""Errors that a user can act on, and how they are printed."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import sys
import time
from collections.abc import Iterator

from omni_train import lines

HEAD_START_SECONDS = 10.0
"""Seconds for which a rank waits for the first one to print the error of both: a launcher ends all when one exits."""

FAILED = "omni_train/failed"
"""Key in the ranks' store of exit code and line of the rank that failed first."""


class UserError(Exception):
    """Error of something that the user gave. The message is one line: what, where, what to do. The exit code is 2."""

    announced = False
    status = 2


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Context in which the message of a ``UserError`` gets before it what it is about."""
    try:
        yield
    except UserError as error:
        error.args = (f"{what}: {error}",)
        raise


class RunFailed(UserError):
    """Error of something that a run needs, as a full disk. The message is one line; the exit code is 1: try again."""

    status = 1


_OF_A_PERSON = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def cannot_write(path: object, error: OSError) -> UserError:
    """Error of a file that must be written: a ``UserError`` where only a person can mend it, else a ``RunFailed``."""
    if error.filename and os.path.islink(error.filename) and not os.path.exists(error.filename):
        return UserError(f"{error.filename}: is a link that leads nowhere; is a disk missing?")
    wrong = error.errno in _OF_A_PERSON
    return (UserError if wrong else RunFailed)(f"{path}: cannot be written: {error.strerror or first_line(error)}")


class RankFailed(Exception):
    """Error on a rank that lost its connection to another one, which has failed and has said so.

    Args:
        code: exit code of the run.
        line: what failed, on which rank.
    """

    def __init__(self, code: int, line: str) -> None:
        super().__init__(line)
        self.code = code


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def described(error: BaseException) -> str:
    """Description of an error in one line: class, message, rank and host."""
    rank = os.environ.get("RANK", "0")
    return f"{type(error).__name__}: {first_line(error)} on rank {rank} at {lines.host()}"


def announce(error: UserError) -> None:
    """Print the error on stderr, once for all the ranks that have it; a second call does nothing.

    Connected ranks agree through their store, so that an error of one rank alone is printed by that rank: call this
    before the process group is destroyed. Without one, all ranks of a machine have the same error, and the first
    prints it.
    """
    if error.announced:
        return
    error.announced = True
    distributed = sys.modules.get("torch.distributed")
    store = None
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        try:
            store = distributed.distributed_c10d._get_default_store()
            first = store.add(f"omni_train/error/{error}", 1) == 1
            if not first:
                store.wait([f"omni_train/printed/{error}"], datetime.timedelta(seconds=HEAD_START_SECONDS))
        except RuntimeError:  # the store is gone with the rank that kept it
            first = True
    else:
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first and os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(HEAD_START_SECONDS)
    if first:
        lines.write(f"error: {error}")
        if store is not None:
            with contextlib.suppress(RuntimeError):
                store.set(f"omni_train/printed/{error}", "")
