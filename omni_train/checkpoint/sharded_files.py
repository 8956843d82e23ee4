"""Reading of Megatron's sharded checkpoints as data, without running any code that they hold.

They hold pickles in two places, which ``torch.distributed.checkpoint`` reads as they come: the file ``.metadata``, and
in the shards whatever is no tensor. Here the first is read into inert records, of which the few real objects are made
that reading needs, and the second by :mod:`omni_train.checkpoint.state_files`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from omni_train.checkpoint.integrity import reading
from omni_train.checkpoint.state_files import check_extra_states, load_plain, named_in, refusal
from omni_train.errors import UserError
from omni_train.platform.unpickling import tensors_and


@contextlib.contextmanager
def as_data(checkpoint: Path) -> Iterator[None]:
    """Context in which Megatron reads a checkpoint through a :class:`Reader`.

    Raises:
        UserError: the checkpoint is damaged, or holds more than data.
        RuntimeError: as :func:`unwrapped_errors` raises it.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as strategy

    if (checkpoint / serialization.COMMON_STATE_FNAME).exists():
        raise UserError(
            f"{checkpoint / serialization.COMMON_STATE_FNAME}: no checkpoint of omni_train has this file; "
            "use another checkpoint"
        )
    reader = Reader(checkpoint)
    with reading(checkpoint / ".metadata"):
        reader.read_metadata()  # first, because Megatron would wrap its error in pages of others
    theirs = strategy._get_filesystem_reader
    try:
        for module in (serialization, strategy):
            module._get_filesystem_reader = lambda *_, **__: reader
        with unwrapped_errors():
            yield
    finally:
        for module in (serialization, strategy):
            module._get_filesystem_reader = theirs


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Context that unwraps errors of ``torch.distributed.checkpoint``, which wraps them in no ``Exception``.

    Raises:
        UserError: a rank's reader raised it.
        RuntimeError: with the message of any other error, of the first rank that failed.
    """
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if refused := next((cause for cause in causes if isinstance(cause, UserError)), None):
            raise refused from error
        raise RuntimeError(str(causes[0]) or type(causes[0]).__name__) from error


class Reader(FileSystemReader):
    """Storage reader of a checkpoint's shards that runs nothing of what is in them.

    Raises:
        UserError: on reading: a file holds more than data, or is damaged.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    @functools.cached_property
    def _metadata(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                return _metadata(_Records(file).load())
        except _Foreign as error:
            raise refusal(path, str(error)) from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        objects: Any = _PlainObjects(planner, Path(self.path))  # a planner by what it hands on
        try:
            with tensors_and():
                return super().read_data(plan, objects)
        except pickle.UnpicklingError as error:
            raise refusal(Path(self.path), named_in(error) or "something") from error


class _PlainObjects:
    """Load planner that gets objects only after they were read as data and serialized again."""

    def __init__(self, planner: LoadPlanner, path: Path) -> None:
        self._planner, self._path = planner, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        key = item.dest_index.fqn
        state = load_plain(value, f"{self._path}: its {key}")
        check_extra_states(self._path, [(key, part) for part in state])
        anew = io.BytesIO()
        torch.save(state, anew)
        anew.seek(0)
        self._planner.load_bytes(item, anew)


class _Record:
    """Inert stand-in for an object of a pickle: its arguments and its state, without its methods."""

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of

    def __new__(cls, *_: Any) -> _Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Foreign(pickle.UnpicklingError):
    """Inert stand-in for something that no genuine checkpoint has; its text is the name."""


_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}
"""Classes and functions that genuine checkpoints of every layout name in ``.metadata``."""

_RECORDS = {known: type(known[1], (_Record,), {}) for known in _KNOWN}


class _Records(pickle.Unpickler):
    """Unpickler that makes records in the place of known objects."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        try:
            return _RECORDS[module, name]
        except KeyError:
            raise _Foreign(f"{module}.{name}") from None


def _metadata(record: _Record) -> Metadata:
    """Metadata of a checkpoint, with every field checked for its type."""
    entries = {_text(name): _entry(entry) for name, entry in record.state["state_dict_metadata"].items()}
    storage = {_index(index): _place(place) for index, place in record.state["storage_data"].items()}
    return Metadata(entries, storage_data=storage)


def _entry(record: _Record) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(record, _RECORDS["torch.distributed.checkpoint.metadata", "BytesStorageMetadata"]):
        return BytesStorageMetadata()
    dtype = record.state["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor's type is none")
    chunks = [
        ChunkStorageMetadata(_size(chunk.state["offsets"]), _size(chunk.state["sizes"]))
        for chunk in record.state["chunks"]
    ]
    return TensorStorageMetadata(TensorProperties(dtype), _size(record.state["size"]), chunks)


def _index(record: _Record) -> MetadataIndex:
    offset, index = record.state.get("offset"), record.state.get("index")
    return MetadataIndex(
        _text(record.state["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else operator.index(index),
    )


def _place(record: _Record) -> _StorageInfo:
    file = _text(record.state["relative_path"])
    if Path(file).name != file:
        raise ValueError(f"{file} is not the name of a file beside it")
    return _StorageInfo(file, operator.index(record.state["offset"]), operator.index(record.state["length"]))


def _size(record: _Record) -> torch.Size:
    (sizes,) = record.made_of
    return torch.Size(sizes)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is no text")
    return value
