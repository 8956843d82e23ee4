"""Tensors of a sharded checkpoint one by one, without process groups and without the model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from omni_train.checkpoint.integrity import damaged
from omni_train.checkpoint.sharded_files import Reader, unwrapped_errors
from omni_train.errors import UserError, first_line

_NOT_OF_THE_MODEL = ("optimizer.", "progress")


class CheckpointReader:
    """Reader of the model's tensors in a sharded checkpoint, without process groups and without the model."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self._reader = Reader(checkpoint)
        entries = self._reader.read_metadata().state_dict_metadata
        self._tensors = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_OF_THE_MODEL)
        }

    def check(self, names: Collection[str]) -> None:
        """Refuse a checkpoint that has other tensors than these.

        Raises:
            UserError: naming the first tensor without a counterpart, or missing.
        """
        for name in sorted(self._tensors.keys() ^ {*names}):
            why = "has no counterpart in this format" if name in self._tensors else "is not in the checkpoint"
            raise UserError(f"{self.path}: {name} {why}; is it another model?")

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self._tensors)

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
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        try:
            with unwrapped_errors():
                torch.distributed.checkpoint.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except RuntimeError as error:
            raise damaged(self.path, f"{name} cannot be read: {first_line(error)}", "use another") from error
        return tensor
