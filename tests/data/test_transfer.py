from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from omni_train.data import transfer
from omni_train.errors import UserError


@dataclass
class Sent:
    tensors: list = field(default_factory=list)


def test_tensors_arrive_as_they_were_and_can_be_written():
    ours, theirs = transfer.channel()
    tensors = [
        torch.arange(12).view(3, 4).T,
        torch.zeros(0, 128),
        torch.zeros(0, dtype=torch.uint8),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.arange(10, dtype=torch.int32)[3:7],
    ]
    transfer.send(ours, Sent(tensors))
    received, beside = transfer.receive(theirs)
    assert not beside
    addresses = {tensor.untyped_storage().data_ptr() for tensor in received.tensors}
    assert len(addresses) == len(tensors)  # torch.save tells them by it
    for tensor, other in zip(tensors, received.tensors, strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype and tensor.shape == other.shape
        other.zero_()


def test_large_arrays_arrive_one_after_the_other_and_leave_no_file_open():
    ours, theirs = transfer.channel()
    arrays = [np.full(3_000_000, number, dtype=np.uint8) for number in range(3)]
    before = set(os.listdir("/proc/self/fd"))
    for array in arrays:
        transfer.send(ours, {"array": array})
    for array in arrays:
        assert np.array_equal(transfer.receive(theirs)[0]["array"], array)
    assert set(os.listdir("/proc/self/fd")) == before


def test_open_files_travel_beside_an_object():
    ours, theirs = transfer.channel()
    reading, writing = os.pipe()
    transfer.send(ours, "read it", reading)
    os.close(reading)
    value, (received,) = transfer.receive(theirs)
    os.write(writing, b"line")
    assert value == "read it"
    assert os.read(received, 10) == b"line"
    assert not os.get_inheritable(received)  # by programs that a training process starts
    os.close(received)
    os.close(writing)


def test_what_was_sent_is_received_before_the_end_even_if_not_all_was_read_there():
    ours, theirs = transfer.channel()
    transfer.send(ours, 1)
    transfer.send(ours, UserError("two"))
    theirs.send(b"unread")
    ours.close()
    assert transfer.receive(theirs)[0] == 1
    assert str(transfer.receive(theirs)[0]) == "two"
    with pytest.raises(EOFError):
        transfer.receive(theirs)
    with pytest.raises(BrokenPipeError):
        transfer.send(theirs, 3)
