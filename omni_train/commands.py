"""Commands that make data, for ``omni-train data`` and for pipelines: each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _rehearsal() -> Callable[..., Any]:
    from omni_train.data_pipelines.rehearsal import build

    return build


def _pack() -> Callable[..., Any]:
    from omni_train.data_pipelines.pack import pack

    return pack


def _codes() -> Callable[..., Any]:
    from omni_train.frozen.codec import write_codes

    return write_codes


def _strata() -> Callable[..., Any]:
    from omni_train.evaluation.strata import write_strata

    return write_strata


def _states() -> Callable[..., Any]:
    from omni_train.training.states import write_states

    return write_states


DATA: Mapping[str, Callable[[], Callable[..., Any]]] = {
    "rehearsal": _rehearsal,
    "pack": _pack,
    "codes": _codes,
    "strata": _strata,
    "states": _states,
}
"""Name -> loader of the function, importable by name, that makes the data in the folder that its ``out`` names."""
