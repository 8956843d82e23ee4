"""Opening of files that others made, so that none can hang a process or fill its memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from omni_train.errors import UserError


class TooLarge(OSError):
    """Error of a file of more bytes than may be read."""


def open_regular(path: str | Path) -> BinaryIO:
    """Regular file, opened for reading.

    A FIFO would never open, and a device never end. The open descriptor is checked, so that nothing can be put in the
    file's place in between.

    Raises:
        OSError: the file cannot be opened, or with EINVAL it is no regular file.
        ValueError: the name has a zero byte.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_whole(file: BinaryIO, most: int) -> bytes:
    """Bytes of an open file, of which there are at most ``most``.

    Raises:
        TooLarge: the file has more; nothing is read of it.
        OSError: the size is not what it was when the file was opened: it is being written, or is no file on a disk
            (those of ``/proc`` have no size).
    """
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise TooLarge(errno.EFBIG, f"{size:,} bytes are more than {most:,}", str(file.name))
    data = file.read(size + 1)
    if len(data) != size:
        raise OSError(errno.EIO, "its size changes while it is read", str(file.name))
    return data


def read_regular(path: str | Path, most: int) -> bytes:
    """Bytes of a regular file, of which there are at most ``most``; raises as ``open_regular`` and ``read_whole``."""
    with open_regular(path) as file:
        return read_whole(file, most)


def read_settings(path: Path, most: int) -> str:
    """Text of a small file that the user gave.

    Raises:
        UserError: the file cannot be read, or has more than ``most`` bytes.
    """
    try:
        return read_regular(path, most).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is it the right file?") from None


def real_path(file: BinaryIO) -> Path:
    """Real path of an open file, whatever links led to it."""
    try:
        return Path(os.readlink(f"/proc/self/fd/{file.fileno()}"))
    except OSError:  # no /proc here
        return Path(os.path.realpath(file.name))
