"""Transfer of objects between processes: tensors and arrays lie in memory that both map, and its descriptor is sent.

The memory has no name, so that nothing of it is left behind however a process ends, and it does not count against the
size of /dev/shm, which is 64 MiB in many containers. A message is whole or not there at all: a process that is killed
while it sends leaves no half of one.
"""

from __future__ import annotations

import array
import errno
import io
import mmap
import os
import pickle
import socket
from typing import Any

import torch

ALIGNMENT = 64
"""Alignment in bytes of the tensors in shared memory."""
MAX_BUFFERS = 1024
MAX_DESCRIPTORS = 8


def channel() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection between a process and one that it starts."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, value: Any, *descriptors: int) -> None:
    """Send an object, with descriptors of open files beside it.

    Raises:
        OSError: the other end is closed.
    """
    buffers: list[pickle.PickleBuffer] = []
    body = io.BytesIO()
    _Pickler(body, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [body.getbuffer(), *(buffer.raw() for buffer in buffers)]
    if len(parts) > MAX_BUFFERS:
        raise ValueError(f"{len(parts)} arrays in one object, {MAX_BUFFERS} at most")
    memory = os.memfd_create("omni_train", os.MFD_CLOEXEC)
    try:
        sizes = array.array("Q", [part.nbytes for part in parts])
        starts = _starts(sizes)
        os.ftruncate(memory, starts[-1] + sizes[-1])
        with open(memory, "wb", closefd=False) as file:
            for start, part in zip(starts, parts, strict=True):
                file.seek(start)
                file.write(part)
        socket.send_fds(end, [sizes.tobytes()], [memory, *descriptors])
    finally:
        os.close(memory)


def receive(end: socket.socket) -> tuple[Any, list[int]]:
    """Next object and the descriptors of open files beside it; its tensors stay in the shared memory.

    Raises:
        EOFError: the other end is gone, and all that it sent has been received.
    """
    try:
        message, descriptors, flags = _message(end)
    except ConnectionResetError:  # told once where the other end left something unread; what it sent is still there
        message, descriptors, flags = _message(end)
    if not message:
        raise EOFError
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "too many open files to receive one more; raise the limit (ulimit -n)")
    sizes = array.array("Q", message)
    memory, *beside = descriptors
    starts = _starts(sizes)
    try:
        mapped = memoryview(mmap.mmap(memory, starts[-1] + sizes[-1]))
    finally:
        os.close(memory)
    body, *buffers = (mapped[start : start + length] for start, length in zip(starts, sizes, strict=True))
    return pickle.loads(body, buffers=buffers), beside


def _message(end: socket.socket) -> tuple[bytes, list[int], int]:
    # socket.recv_fds leaves the files open in whatever program this process starts.
    descriptors = array.array("i")
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * descriptors.itemsize)
    size = MAX_BUFFERS * array.array("Q").itemsize
    message, ancillary, flags, _ = end.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    for _, _, data in ancillary:
        descriptors.frombytes(data[: len(data) // descriptors.itemsize * descriptors.itemsize])
    return message, list(descriptors), flags


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Pickle tensors as arrays, whose memory we copy ourselves."""
        return (torch.from_numpy, (value.numpy(),)) if type(value) is torch.Tensor else NotImplemented


def _starts(sizes: array.array) -> list[int]:
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += max(1, -(-size // ALIGNMENT)) * ALIGNMENT  # torch tells tensors by their addresses, empty ones too
    return starts
