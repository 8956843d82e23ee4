"""The checkpoints of one run as directories: complete or not there, pruned, with a link to the latest.

A checkpoint is a directory ``step_XXXXXXXX``. It is written beside its final name, renamed when every rank's part is on
disk, and only then does the link ``latest`` move to it; a crash at any moment leaves the previous one usable. The link
is for people and their scripts: which checkpoint is the newest is read from the directories, because copies and object
stores lose links.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from omni_train import platform
from omni_train.errors import UserError
from omni_train.platform.logs import warn
from omni_train.recipe.schema import CheckpointConfig

_PARTIAL = ".partial"
_LATEST = "latest"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / "metadata.json").exists()


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a run's ``checkpoints``, or that its link leads to."""
    found = [*_steps(directory), *filter(_is_step, [(directory / _LATEST).resolve()])]
    return max(filter(is_complete, found), key=step_of, default=None)


def holds_checkpoints(directory: Path) -> bool:
    """Whether there are checkpoints in a directory, complete or not, or what is left of them."""
    return bool(_steps(directory)) or os.path.lexists(directory / _LATEST)


def resolve(path: str | Path) -> Path:
    """The checkpoint directory that a user's path means: a checkpoint, a run directory, or its ``checkpoints``.

    Raises:
        UserError: there is no complete checkpoint.
    """
    path = Path(path)
    if is_complete(path):
        return path.resolve()
    folder = path.parent if path.name == _LATEST else path
    for directory in (folder, folder / "checkpoints"):
        copied = directory / _LATEST  # a folder where a copy has followed the link
        if found := newest(directory) or (copied if is_complete(copied) else None):
            return found.resolve()
    raise UserError(f"{path}: no complete checkpoint here; give a step_XXXXXXXX directory or a run directory")


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step_")) if checkpoint.name.startswith("step_") else 0


def point_latest(checkpoint: Path) -> None:
    """Move the link ``latest`` beside a checkpoint to it."""
    fresh = checkpoint.with_name(_LATEST + ".new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(checkpoint.name)
    os.replace(fresh, checkpoint.with_name(_LATEST))


def _steps(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first, complete or not."""
    return sorted(filter(_is_step, directory.glob("step_*")), key=step_of)


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"step_\d+", path.name) is not None


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
        """The newest complete checkpoint, to go on from; None where a run has none yet. Says it of what it leaves out.

        Raises:
            UserError: something is there, but nothing that a run can go on from.
        """
        found, link = newest(self.directory), self.directory / _LATEST
        if link.is_dir() and not link.is_symlink():
            raise UserError(
                f"{link}: is a folder, not a link; remove it where it is a copy of the newest step_XXXXXXXX beside it, "
                "or else give it the name of the step that it holds"
            )
        incomplete = [path for path in _steps(self.directory) if found is None or step_of(path) > step_of(found)]
        if found is None:
            if incomplete or os.path.lexists(link):
                lost = incomplete[-1] if incomplete else link.resolve()
                raise UserError(
                    f"{lost}: not a complete checkpoint, and there is no other to go on from; restore it, or remove "
                    f"{self.directory} to start anew"
                )
            return None
        if incomplete:
            warn(f"{incomplete[-1]}: not a complete checkpoint, left out")
        if link.resolve() != found.resolve():
            warn(f"{link}: does not lead to the newest complete checkpoint, {found.name}; now it does")
            if platform.rank() == 0:
                point_latest(found)
        return found.resolve()

    def finish(self, blocking: bool = False) -> None:
        """Complete the writes that are done; with `blocking`, wait for all of them. Collective."""

    def close(self) -> None:
        """Wait for the last write."""
        self.finish(blocking=True)

    @staticmethod
    def loader_states(checkpoint: Path) -> list:
        """The loader states of all data ranks that wrote the checkpoint, in their order.

        Raises:
            UserError: one is not there.
        """
        states = [torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("loader_*.pt"))]
        if not states or len(states) != states[0]["world_size"]:
            raise UserError(f"{checkpoint}: lacks files loader_XXXXX.pt; restore them, or use another checkpoint")
        return states

    def _begin(self, step: int, loader_state) -> tuple[Path, Path] | None:
        """Where a checkpoint is written and where it will be, with this rank's loader in it; None: it is there."""
        final = self.directory / f"step_{step:08d}"
        if is_complete(final):
            return None
        partial = final.with_name(final.name + _PARTIAL)
        if platform.rank() == 0:
            for unfinished in (partial, final):
                shutil.rmtree(unfinished, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        if loader_state is not None:
            torch.save(loader_state, partial / f"loader_{platform.parallel.data_rank():05d}.pt")
        return partial, final

    def _complete(self, partial: Path, final: Path) -> None:
        if platform.rank() == 0:
            partial.rename(final)
            self._completed(final)
            point_latest(final)
            self._prune()
        torch.distributed.barrier()

    def _completed(self, final: Path) -> None:
        """On the first rank, before older checkpoints are removed."""

    def _prune(self) -> None:
        if not self.config.keep:
            return
        kept = [path for path in _steps(self.directory) if is_complete(path)][-self.config.keep :]
        for old in _steps(self.directory):
            if step_of(old) < step_of(kept[0]):
                (old / "metadata.json").unlink(missing_ok=True)  # incomplete from here on, should this be interrupted
                shutil.rmtree(old)
