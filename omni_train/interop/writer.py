"""Writer of a Hugging Face folder's tensors, file by file, from a sharded checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from omni_train.errors import UserError, first_line
from omni_train.interop.folder import tensor_bytes
from omni_train.interop.rows import TensorMap, as_rows, row_count, spans

_NOT_OF_THE_MODEL = ("optimizer.", "progress")


@dataclass
class Target:
    """Tensor to write, and the sources of its rows."""

    checkpoint: CheckpointReader
    shape: tuple[int, ...]
    dtype: torch.dtype
    # Name of our tensor, first row in it, first row in this one, number of rows.
    rows: list[tuple[str, int, int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its type."""
        return prod(self.shape) * self.dtype.itemsize


class CheckpointReader:
    """Reader of the model's tensors in a sharded checkpoint, without process groups and without the model."""

    def __init__(self, checkpoint: Path) -> None:
        from omni_train.checkpoint.sharded_files import Reader

        self.path = checkpoint
        self._reader = Reader(checkpoint)
        entries = self._reader.read_metadata().state_dict_metadata
        self._tensors = {
            name: entry
            for name, entry in entries.items()
            if hasattr(entry, "size") and not name.startswith(_NOT_OF_THE_MODEL)
        }

    def check(self, table: TensorMap) -> None:
        """Refuse a checkpoint that is not exactly what the table writes.

        Raises:
            UserError: naming the first tensor without a counterpart, or missing.
        """
        for name in sorted(self._tensors.keys() ^ table.keys()):
            why = "has no counterpart in this format" if name in self._tensors else "is not in the checkpoint"
            raise UserError(f"{self.path}: {name} {why}; is it another model?")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor in the checkpoint."""
        return self._tensors[name].properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from the parts of all ranks.

        Raises:
            DamagedCheckpoint: the tensor cannot be read.
        """
        from torch.distributed import checkpoint

        from omni_train.checkpoint.integrity import damaged
        from omni_train.checkpoint.sharded_files import unwrapped_errors

        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        try:
            with unwrapped_errors():
                checkpoint.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except RuntimeError as error:
            raise damaged(self.path, f"{name} cannot be read: {first_line(error)}", "use another") from error
        return tensor


File = dict[str, Target | torch.Tensor] | Path
"""A file to write: its tensors, or the file that it is a copy of."""


def plan_files(
    checkpoint: CheckpointReader, table: TensorMap, dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[File]:
    """Tensors of each file to write, in the table's order, none larger than `max_bytes` unless one tensor is.

    Args:
        checkpoint: the checkpoint to export.
        table: tensor map of the format.
        dtypes: type of each tensor to write, by its name in the folder; others keep the checkpoint's.
        max_bytes: largest size of a file.
    """
    targets: dict[str, Target] = {}
    for ours, parts in table.items():
        shape = checkpoint.shape(ours)
        whole = len(parts) == 1 and parts[0].stop is None
        for span in spans(ours, shape, parts):
            # Stacked experts come apart into matrices; a convolution's middle axis, of length one, stays.
            rest = shape[1:] if whole or len(shape) < 3 or shape[1] == 1 else shape[-1:]
            dtype = dtypes.get(span.name, checkpoint.dtype(ours))
            target = targets.setdefault(span.name, Target(checkpoint, (0, *rest), dtype))
            count = span.stop - span.start
            stop = shape[0] if whole else max(target.shape[0], span.source + count)
            target.shape = (stop, *rest)
            target.rows.append((ours, span.start, span.source, count))
    files: list[dict[str, Target | torch.Tensor]] = [{}]
    size = 0
    for name, target in targets.items():
        if files[-1] and size + target.nbytes > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = target
        size += target.nbytes
    return [*files]


def write_files(files: list[File], folder: Path, rank: int, world_size: int) -> None:
    """Write this rank's share of the files.

    Args:
        files: from :func:`plan_files`, tensors, and paths of files to copy.
        folder: the folder to write.
        rank, world_size: every world_size-th file from the rank-th on is this rank's.
    """
    for name, targets in list(zip(_file_names(files), files, strict=True))[rank::world_size]:
        partial = folder / f".{name}.partial"
        if isinstance(targets, Path):
            shutil.copy(targets, partial)
            os.replace(partial, folder / name)
            continue
        save_file(_read(targets), partial, metadata={"format": "pt"})
        os.replace(partial, folder / name)


def _read(targets: Mapping[str, Target | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a file; each of a checkpoint's is read once."""
    tensors: dict[str, torch.Tensor] = {}
    views: dict[tuple[CheckpointReader, str], list[tuple[torch.Tensor, int]]] = {}  # to fill from one of its tensors
    for key, target in targets.items():
        if isinstance(target, torch.Tensor):
            tensors[key] = target.contiguous()
            continue
        tensors[key] = torch.empty(target.shape, dtype=target.dtype)
        assert sum(count for *_, count in target.rows) == row_count(target.shape)
        for ours, start, to, count in target.rows:
            view = as_rows(tensors[key])[to : to + count]
            views.setdefault((target.checkpoint, ours), []).append((view, start))
    for (checkpoint, ours), parts in views.items():
        source = as_rows(checkpoint.read(ours))
        for view, start in parts:
            view.copy_(source[start : start + len(view)])
        del source  # before the next is read
    return tensors


def write_index(files: list[File], folder: Path) -> int:
    """Write the index of which file holds which tensor, where there are several files.

    Returns:
        the number of tensors in all files.
    """
    sizes = {name: _sizes(file) for name, file in zip(_file_names(files), files, strict=True)}
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sum(file.values()) for file in sizes.values())},
            "weight_map": {key: name for name, file in sizes.items() for key in file},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sum(map(len, sizes.values()))


def _sizes(file: File) -> dict[str, int]:
    """Bytes of each tensor of a file."""
    return tensor_bytes(file) if isinstance(file, Path) else {key: target.nbytes for key, target in file.items()}


def _file_names(files: list[File]) -> list[str]:
    count = len(files)
    return (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
