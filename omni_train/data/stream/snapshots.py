"""Snapshots of streams: energon's state of one as JSON, and back. Reading one runs nothing that is in it.

The state of a stream is nested as its datasets are. A snapshot is read beside the state of a stream newly opened, and
has to be of the same shape: the same classes and fields, each holding what that field holds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.state import FlexState

from omni_train.errors import UserError


class _Unlike(Exception):
    """Error of a snapshot in which something is not as it should be."""


def write_snapshot(state: FlexState) -> bytes:
    """Snapshot of a stream's state, as bytes."""
    return json.dumps(state, default=_plain, separators=(",", ":")).encode()


def read_snapshot(data: bytes, fresh: FlexState) -> FlexState:
    """State of a stream that ``write_snapshot`` wrote.

    Args:
        data: bytes of the snapshot.
        fresh: state of a stream of the same recipe, whatever it has read.

    Raises:
        UserError: the bytes are no such snapshot.
    """
    try:
        return _state(json.loads(data.decode()), fresh)
    except (ValueError, RecursionError, _Unlike) as error:
        what = f": {error}" if isinstance(error, _Unlike) and error.args else ""
        raise UserError(
            f"data: the checkpoint's place in the data cannot be read{what}; it is damaged, or another version or "
            "other data.sources wrote it: resume from another checkpoint, or start a new run with init_from"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, SliceState):
        return [value.index, value.current]
    raise TypeError(f"a stream's state holds a {type(value).__name__}")


def _state(value: Any, fresh: FlexState) -> FlexState:
    _check(isinstance(value, dict) and value.keys() == fresh.keys())
    state = FlexState()
    for name, part in value.items():
        try:
            state[name] = (
                _state(part, fresh[name]) if isinstance(fresh[name], FlexState) else _FIELDS[name](part, fresh[name])
            )
        except _Unlike as error:
            raise error if error.args else _Unlike(f"wrong {name} of {fresh.get('__class__', 'a generator')}") from None
    return state


def _check(holds: bool) -> None:
    if not holds:
        raise _Unlike


def _class(value: Any, fresh: str) -> str:
    _check(value == fresh)
    return fresh


def _datasets(value: Any, fresh: list[FlexState]) -> list[FlexState]:
    _check(isinstance(value, list) and len(value) == len(fresh))
    return [_state(part, its) for part, its in zip(value, fresh, strict=True)]


def _generator(value: Any, fresh: bytes) -> bytes:
    _check(isinstance(value, str))
    state = base64.b64decode(value, validate=True)
    _check(len(state) == len(fresh))
    return state


def _number(value: Any, _fresh: Any = None) -> int:
    _check(type(value) is int and 0 <= value < 2**63)
    return value


def _key(value: Any, _fresh: Any = None) -> tuple[str | int, ...]:
    _check(isinstance(value, list) and all(type(part) in (str, int) for part in value))
    return tuple(value)


def _clock(value: Any) -> float:
    _check(type(value) is float and value >= 0)
    return value


def _slice(value: Any) -> SliceState:
    _check(isinstance(value, list) and len(value) == 2)
    return SliceState(index=_number(value[0]), current=_number(value[1]))


def _counts(value: Any, _fresh: Any = None) -> dict[str, int]:
    _check(isinstance(value, dict))
    return {reason: _number(count) for reason, count in value.items()}


def _refused(value: Any, fresh: dict | list) -> dict[str, int] | list[dict[str, int]]:
    return (_counts if isinstance(fresh, dict) else _as_many(_counts))(value, fresh)


def _optional(read: Callable) -> Callable:
    return lambda value, fresh=None: None if value is None else read(value)


def _every(read: Callable) -> Callable:
    def read_all(value: Any, _fresh: Any = None) -> list:
        _check(isinstance(value, list))
        return [read(part) for part in value]

    return read_all


def _as_many(read: Callable) -> Callable:
    def read_all(value: Any, fresh: list) -> list:
        _check(isinstance(value, list) and len(value) == len(fresh))
        return [read(part) for part in value]

    return read_all


_FIELDS: dict[str, Callable[[Any, Any], Any]] = {
    "__class__": _class,
    "datasets": _datasets,
    "rng": _generator,
    "_restore_keys": _every(_key),
    "_clocks": _as_many(_clock),
    "_refused": _refused,
    "_pending_slices_offset": _optional(_number),
    "_pending_slice_indexes": _optional(_every(_number)),
    "_active_slice_state": _as_many(_optional(_slice)),
    "_sample_count": _number,
    "_epoch_count": _number,
    "_epoch_sample_count": _number,
    "_repetition": _number,
    "_index": _number,
    "_sample_index": _number,
    "_generator_sample_key": _optional(_key),
    "_generator_offset": _optional(_number),
}
