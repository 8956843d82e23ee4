"""The CPU keeps back what nobody has waited for, as a GPU may."""

from __future__ import annotations

import pytest
import torch

POISON = torch.iinfo(torch.int64).min


def counts():
    return torch.arange(3) + 5


def copies_to_the_host(rank, world_size):
    """What a copy that does not block reads as before and after each kind of wait: on the host, and of streams."""
    from omni_train import platform

    source, found = counts(), {}
    side = torch.cuda.Stream()

    def copy():
        with torch.cuda.stream(side):
            return source.to("cpu", non_blocking=True)

    def read(name, copied, wait):
        before = copied.tolist()
        wait()
        found[name] = before, copied.tolist()

    first = copy()
    event = side.record_event()
    later = copy()
    read("event", first, event.synchronize)
    found["recorded too early"] = later.tolist()
    read("stream", later, side.synchronize)
    read("device", copy(), torch.cuda.synchronize)
    read("current stream", source.to(torch.device("cpu"), non_blocking=True), torch.cuda.current_stream().synchronize)
    copied = copy()
    read("streams alone", copied, lambda: torch.cuda.current_stream().wait_stream(side))
    read("streams, then the host", copied, torch.cuda.current_stream().synchronize)
    pinned = torch.zeros(4, dtype=torch.int64, pin_memory=True)
    pinned[1:].copy_(source, non_blocking=True)
    read("pinned", pinned, torch.cuda.synchronize)
    pinned[1:].copy_(source, non_blocking=True)
    pinned[1:].copy_(source + 1, non_blocking=True)
    read("pinned twice", pinned, torch.cuda.synchronize)
    found["blocking"] = source.to("cpu").tolist(), source.cpu().tolist()
    found["to the device"] = source.to(platform.device(), non_blocking=True).tolist()
    found["source"] = source.tolist()
    return found


def test_a_copy_to_the_host_arrives_when_the_host_waits_for_it(distributed):
    found = distributed(1, copies_to_the_host)[0]
    values, poison = counts().tolist(), [POISON] * 3
    for name in ("event", "stream", "device", "current stream", "streams, then the host"):
        assert found[name] == (poison, values), name
    assert found["streams alone"] == (poison, poison)
    assert found["recorded too early"] == poison
    assert found["pinned"] == ([0, *poison], [0, *values])
    assert found["pinned twice"] == ([0, *poison], [0, *(value + 1 for value in values)])
    assert found["blocking"] == (values, values)
    assert found["to the device"] == found["source"] == values


def work_of_a_side_stream(rank, world_size):
    source, found = torch.arange(4.0), {}
    side, main, copies = torch.cuda.Stream(), torch.cuda.current_stream(), []

    def work():
        with torch.cuda.stream(side):
            copied = source.to("cuda", non_blocking=True)
            doubled = copied * 2
            doubled[2:].add_(1)
            view = source[1:]
        copies.append(copied)
        return doubled, view

    doubled, view = work()
    found["before"] = doubled.isnan().all() and copies[0].isnan().all(), view.tolist()
    with torch.cuda.stream(side):
        found["inside"] = doubled.tolist()
    found["left again"] = doubled.isnan().all()
    main.wait_stream(side)
    found["stream"], found["copy"] = doubled.tolist(), copies[0].tolist()
    doubled, _ = work()
    event = side.record_event()
    event.wait()
    found["event"] = doubled.tolist()
    doubled, _ = work()
    torch.cuda.Stream().wait_stream(torch.cuda.Stream())
    found["other streams"] = doubled.isnan().all()
    torch.cuda.synchronize()
    found["device"] = doubled.tolist()
    with side:
        kept = torch.zeros(2)
        main.wait_stream(side)
    found["waited inside"] = kept.tolist()
    return found


def test_what_a_side_stream_writes_is_there_for_the_stream_that_waits(distributed):
    found = distributed(1, work_of_a_side_stream)[0]
    assert found["before"] == (True, [1.0, 2.0, 3.0])
    for name in ("inside", "stream", "event", "device"):
        assert found[name] == [0.0, 2.0, 5.0, 7.0], name
    assert found["copy"] == [0.0, 1.0, 2.0, 3.0]
    assert found["left again"]
    assert found["other streams"]
    assert found["waited inside"] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.uint8, 255), (torch.int32, -(2**31)), (torch.bool, True)],
)
def test_poison_is_what_no_count_can_be(dtype, expected):
    from omni_train.platform.cpu_streams import poison

    assert poison(dtype) == expected
    assert poison(torch.bfloat16) != poison(torch.bfloat16)
