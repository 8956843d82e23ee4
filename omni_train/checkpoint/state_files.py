"""Small states of a checkpoint, as files that can hold data but no code.

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
    """Write what :func:`read_state` can read.

    Raises:
        TypeError: it holds something that is not plain.
    """
    if (other := _first_other(state)) is not None:
        raise TypeError(f"{path}: a {type(other).__name__} is no plain state")
    torch.save(state, path)


def read_state(path: str | Path) -> Any:
    """What :func:`write_state` wrote, its tensors on the CPU.

    Raises:
        DamagedCheckpoint: it is not there, or damaged.
        UserError: it holds something that is not plain; nothing of that is run.
    """
    with reading(Path(path)):
        state = load_plain(path, path, bytes)  # which is how no bytes at all are written
    if (other := _first_other(state)) is not None:
        raise refusal(path, f"a {type(other).__name__}")
    return state


def load_plain(file: str | Path | IO[bytes], name: str | Path, *classes: type) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, plain containers, and objects of ``classes``.

    Args:
        file: path or open file.
        name: the file's, for people.
        classes: none of which may do more than hold data when one is made.

    Raises:
        UserError: it holds something else; nothing of that is run.
        Exception: of any kind, where it is damaged.
    """
    try:
        with tensors_and(*classes):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (named := named_in(error)) is None:
            raise ValueError("it is not what torch.save writes of data") from error
        raise refusal(name, named) from error


def check_extra_states(name: str | Path, entries: Iterable[tuple[str, Any]]) -> None:
    """Refuse what Transformer Engine would unpickle: the state of a layer itself, which is empty where no FP8 is used.

    Args:
        name: the file's, for people.
        entries: keys and values of a model's state.

    Raises:
        UserError: one is not empty.
    """
    for key, value in entries:
        empty = value is None or (isinstance(value, torch.Tensor) and not value.numel())
        if "_extra_state" in key and not empty:
            raise refusal(name, f"something in {key}")


def named_in(error: pickle.UnpicklingError) -> str | None:
    """What ``torch.load`` has refused to make, where it was that."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found and found[1]


def refusal(name: str | Path, found: str) -> UserError:
    """Of a file that holds more than data."""
    return UserError(
        f"{name}: holds {found}, which no checkpoint of omni_train does, and was not run; use another checkpoint"
    )


def _first_other(state: Any) -> Any:
    """Something in a state that is not plain, None where all is."""
    if type(state) is dict:
        parts = [*state.keys(), *state.values()]
    elif type(state) in (list, tuple):
        parts = state
    else:
        return None if type(state) in _PLAIN else state
    return next((other for part in parts if (other := _first_other(part)) is not None), None)
