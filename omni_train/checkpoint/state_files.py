"""Files of a checkpoint's small states, which can hold data but no code.

``torch.save`` writes a pickle, which may name any function to call when it is read, and a checkpoint may come from
anybody. What is read here holds plain containers, numbers, text, bytes and tensors, or is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

from omni_train.checkpoint.integrity import reading
from omni_train.errors import UserError
from omni_train.platform.unpickling import tensors_and

_PLAIN = (type(None), bool, int, float, str, bytes, torch.Tensor)


def write_state(path: str | Path, state: Any) -> None:
    """Write a state of plain containers, numbers, text, bytes and tensors to a file.

    Raises:
        TypeError: the state holds something else.
    """
    if (other := _first_other(state)) is not None:
        raise TypeError(f"{path}: a {type(other).__name__} is no plain state")
    torch.save(state, path)


def read_state(path: str | Path) -> Any:
    """State that :func:`write_state` wrote, its tensors on the CPU.

    Raises:
        DamagedCheckpoint: the file is not there, or damaged.
        UserError: the file holds something that is not plain; nothing of that is run.
    """
    with reading(Path(path)):
        state = load_plain(path, path, bytes)  # torch.save names `bytes` for an empty bytes object
    if (other := _first_other(state)) is not None:
        raise refusal(path, f"a {type(other).__name__}")
    return state


def load_plain(file: str | Path | IO[bytes], name: str | Path, *classes: type) -> Any:
    """State that ``torch.save`` wrote, on the CPU: tensors, plain containers, and objects of ``classes``.

    Args:
        file: path or open file.
        name: name of the file for messages.
        classes: classes whose objects may be made: they must do no more than hold data.

    Raises:
        UserError: the file holds something else; nothing of that is run.
        Exception: of any kind, where the file is damaged.
    """
    try:
        with tensors_and(*classes):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (named := named_in(error)) is None:
            raise ValueError("it is not what torch.save writes of data") from error
        raise refusal(name, named) from error


def check_extra_states(name: str | Path, entries: Iterable[tuple[str, Any]]) -> None:
    """Refuse extra states of layers, which Transformer Engine would unpickle: without FP8 they are empty.

    Args:
        name: name of the file for messages.
        entries: keys and values of a model's state.

    Raises:
        UserError: an extra state is not empty.
    """
    for key, value in entries:
        empty = value is None or (isinstance(value, torch.Tensor) and not value.numel())
        if "_extra_state" in key and not empty:
            raise refusal(name, f"something in {key}")


def named_in(error: pickle.UnpicklingError) -> str | None:
    """Name of the class or function that ``torch.load`` refused, None where the error is another."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found and found[1]


def refusal(name: str | Path, found: str) -> UserError:
    """Error of a file that holds more than data."""
    return UserError(
        f"{name}: holds {found}, which no checkpoint of omni_train does, and was not run; use another checkpoint"
    )


def _first_other(state: Any) -> Any:
    """First thing in a state that is not plain, None where all is."""
    if type(state) is dict:
        parts = [*state.keys(), *state.values()]
    elif type(state) in (list, tuple):
        parts = state
    else:
        return None if type(state) in _PLAIN else state
    return next((other for part in parts if (other := _first_other(part)) is not None), None)
