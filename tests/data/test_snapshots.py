from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.energon.state import FlexState

from omni_train.data.stream.loader import build_loader
from omni_train.data.stream.made import Rows
from omni_train.data.stream.snapshots import read_snapshot, write_snapshot
from omni_train.data.stream.states import redistribute
from omni_train.data.stream.streams import StreamState
from omni_train.errors import UserError
from tests.data.conftest import MODEL


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def states(config) -> tuple[FlexState, FlexState]:
    """Of a stream that has read, and of the same one that has not."""
    rows = Rows(config, MODEL, "train", 3)
    reader = rows._reader(0, StreamState())
    list(itertools.islice(reader, 20))
    return reader.stream.save_state(), rows._reader(0, StreamState()).stream.save_state()


def test_what_was_written_is_read(states):
    state, fresh = states
    assert repr(read_snapshot(write_snapshot(state), fresh)) == repr(state)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all that a snapshot holds, but for one of alike."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def test_whatever_stands_in_the_place_of_something_else_is_refused_in_one_line(states):
    state, fresh = states
    snapshot = json.loads(write_snapshot(state))
    found = list(places(snapshot))
    assert len(found) > 60
    messages = []
    for path in found:
        for wrong in (None, True, -1, 1.5, 2**70, float("nan"), "x", [], {}, [[]], {"x": -1}, {"__class__": "Packer"}):
            changed = {"all": copy.deepcopy(snapshot)}
            *way, last = ("all", *path)
            place = changed
            for step in way:
                place = place[step]
            place[last] = wrong
            try:
                read_snapshot(json.dumps(changed["all"]).encode(), fresh)
            except UserError as error:
                messages.append(str(error))
    assert all(
        re.fullmatch(r"data: the checkpoint's place in the data cannot be read.*", message) for message in messages
    )
    assert len(messages) > 9 * len(found)  # some fields may be null, and some lists empty


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b"{}", b"null", b'{"a": 1'])
def test_other_bytes_are_refused(states, data):
    with pytest.raises(UserError, match=r"place in the data cannot be read.*; it is damaged, or another version"):
        read_snapshot(data, states[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pickle_in_a_checkpoint_runs_nothing(config, workers, tmp_path):
    config.workers = workers
    loader = build_loader(config, MODEL, seed=3)
    state = loader.state_dict()
    marker = tmp_path / "marker"
    for stream in state["streams"].values():
        stream["snapshot"] = pickle.dumps(Bomb(marker))
    loader.load_state_dict(state)
    with pytest.raises(UserError, match=r"^data: the checkpoint's place in the data cannot be read.*init_from$"):
        next(loader)
    assert not marker.exists()
    pickle.loads(state["streams"][0]["snapshot"])
    assert marker.exists()  # it would have


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(rows="3"),
        lambda state: state.update(rows=-1),
        lambda state: state.update(world_size=None),
        lambda state: state.update(more=1),
        lambda state: state.pop("streams"),
        lambda state: state.update(streams=[1]),
        lambda state: state["streams"].update({"0": state["streams"][0]}),
        lambda state: state["streams"][0].update(snapshot="{}"),
        lambda state: state["streams"][0].update(replay=1.0),
        lambda state: state["streams"][0].update(seen=True),
        lambda state: state["streams"][0].update(skipped={"reason": "many"}),
        lambda state: state["streams"][0].pop("skipped"),
    ],
)
def test_a_state_of_other_types_is_refused(config, change):
    loader = build_loader(config, MODEL, seed=3)
    state = loader.state_dict()
    change(state)
    with pytest.raises(UserError, match="holds of the loader is no state of one; it is damaged"):
        loader.load_state_dict(state)
    with pytest.raises(UserError, match="holds of the loader is no state of one; it is damaged"):
        redistribute([state], 1)


def test_states_that_lack_a_stream_are_not_shared_out(config):
    state = build_loader(config, MODEL, seed=3).state_dict()
    state["streams"][7] = state["streams"].pop(1)
    with pytest.raises(UserError, match=r"has the streams \[0, 2, 3, 7\], not all"):
        redistribute([state], 1)
