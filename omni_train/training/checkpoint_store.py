"""The checkpoints of one run as directories: complete or not there, pruned, with a link to the latest.

A checkpoint is a directory ``step_XXXXXXXX``. It is written beside its final name, renamed when every rank's part is on
disk, and only then does the link ``latest`` move to it; a crash at any moment leaves the previous one usable.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from omni_train import platform
from omni_train.errors import UserError
from omni_train.recipe.schema import CheckpointConfig

_PARTIAL = ".partial"


def resolve(path: str | Path) -> Path:
    """The checkpoint directory that a user's path means: a checkpoint, a run directory, or its ``checkpoints``.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path)
    for candidate in (path, path / "latest", path / "checkpoints" / "latest"):
        if (candidate / "metadata.json").exists():
            return candidate.resolve()
    raise UserError(f"{path}: no complete checkpoint here; give a step_XXXXXXXX directory or a run directory")


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step_")) if checkpoint.name.startswith("step_") else 0


class Store:
    """What the stores of both engines share. Process groups must exist."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory, self.config = directory, config
        if platform.rank() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob(f"*{_PARTIAL}"):
                shutil.rmtree(leftover)
        torch.distributed.barrier()

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        link = self.directory / "latest"
        return link.resolve() if (link / "metadata.json").exists() else None

    def finish(self, blocking: bool = False) -> None:
        """Complete the writes that are done; with `blocking`, wait for all of them. Collective."""

    def close(self) -> None:
        """Wait for the last write."""
        self.finish(blocking=True)

    @staticmethod
    def loader_states(checkpoint: Path) -> list:
        """The loader states of all data ranks that wrote the checkpoint, in their order."""
        return [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("loader_*.pt"))]

    def _begin(self, step: int, loader_state) -> tuple[Path, Path] | None:
        """Where a checkpoint is written and where it will be, with this rank's loader in it; None: it is there."""
        final = self.directory / f"step_{step:08d}"
        if (final / "metadata.json").exists():
            return None
        partial = final.with_name(final.name + _PARTIAL)
        if platform.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        if loader_state is not None:
            torch.save(loader_state, partial / f"loader_{platform.parallel.data_rank():05d}.pt")
        return partial, final

    def _complete(self, partial: Path, final: Path) -> None:
        if platform.rank() == 0:
            partial.rename(final)
            self._completed(final)
            fresh = self.directory / "latest.new"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(final.name)
            os.replace(fresh, self.directory / "latest")
            self._prune()
        torch.distributed.barrier()

    def _completed(self, final: Path) -> None:
        """On the first rank, before older checkpoints are removed."""

    def _prune(self) -> None:
        complete = sorted(path for path in self.directory.glob("step_*") if (path / "metadata.json").exists())
        for old in complete[: -self.config.keep] if self.config.keep else []:
            (old / "metadata.json").unlink()  # incomplete from here on, should the removal be interrupted
            shutil.rmtree(old)
