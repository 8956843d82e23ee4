"""States of loaders as checkpoints hold them: checked, and made over to another number of data ranks."""

from __future__ import annotations

from typing import Any

from omni_train.data.stream.streams import StreamState
from omni_train.errors import UserError


def check_state(state: Any) -> None:
    """Check that something is the state of a loader.

    Raises:
        UserError: it is no such state.
    """

    def count(value: Any) -> bool:
        return type(value) is int and value >= 0

    def of_stream(saved: Any) -> bool:
        return (
            isinstance(saved, dict)
            and saved.keys() == vars(StreamState()).keys()
            and isinstance(saved["snapshot"], bytes | None)
            and count(saved["replay"])
            and count(saved["seen"])
            and isinstance(saved["skipped"], dict)
            and all(isinstance(reason, str) and count(number) for reason, number in saved["skipped"].items())
        )

    if not (
        isinstance(state, dict)
        and state.keys() == {"world_size", "rows", "source_samples", "streams"}
        and count(state["world_size"])
        and count(state["rows"])
        and isinstance(state["source_samples"], list)
        and isinstance(state["streams"], dict)
        and all(count(stream) and of_stream(saved) for stream, saved in state["streams"].items())
    ):
        raise UserError(
            "data: what the checkpoint holds of the loader is no state of one; it is damaged, or another version wrote "
            "it: resume from another checkpoint, or start a new run with init_from"
        )


def redistribute(states: list[dict[str, Any]], data_world_size: int) -> list[dict[str, Any]]:
    """States of all data ranks, in rank order, made over to another number of ranks: no row is lost or repeated.

    Raises:
        UserError: the streams or the rows taken so far cannot be shared evenly among that many ranks.
    """
    for state in states:
        check_state(state)
    world_size, rows = len(states), {state["rows"] for state in states}
    if len(rows) > 1:
        raise UserError(
            f"data: the ranks of the checkpoint took different numbers of rows ({sorted(rows)}); it is damaged"
        )
    streams = {stream: saved for state in states for stream, saved in state["streams"].items()}
    if sorted(streams) != list(range(len(streams))):
        raise UserError(f"data: the checkpoint has the streams {sorted(streams)}, not all; it is damaged")
    taken = rows.pop() * world_size
    if len(streams) % data_world_size or taken % data_world_size:
        raise UserError(
            f"data: {len(streams)} streams and {taken} rows taken by {world_size} data ranks cannot be shared evenly "
            f"among {data_world_size}; resume with a number of data ranks that divides both"
        )
    return [
        {
            "world_size": data_world_size,
            "rows": taken // data_world_size,
            "source_samples": states[0]["source_samples"],
            "streams": {s: streams[s] for s in range(rank, len(streams), data_world_size)},
        }
        for rank in range(data_world_size)
    ]
