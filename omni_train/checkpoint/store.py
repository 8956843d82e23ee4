"""The checkpoints of one run as directories: complete or not there, pruned, with a link to the latest.

A checkpoint is a directory ``step_XXXXXXXX``. It is written beside its final name, renamed when every rank's part is on
disk, and only then does the link ``latest`` move to it; a crash at any moment leaves the previous one usable. The link
is for people and their scripts: which checkpoint is the newest is read from the directories, because copies and object
stores lose links. One that was damaged since is set aside under another name, and the one before it is taken.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_train import platform
from omni_train.checkpoint.integrity import DamagedCheckpoint as DamagedCheckpoint
from omni_train.checkpoint.integrity import Digests, damaged, find_damage, write_digests
from omni_train.checkpoint.state_files import read_state, write_state
from omni_train.errors import RunFailed, UserError, cannot_write, first_line
from omni_train.platform.agreement import gathered, on_first_rank
from omni_train.platform.logs import warn
from omni_train.recipe.schema import CheckpointConfig

_PARTIAL = ".partial"
_LATEST = "latest"
_INCOMPLETE = "it was not written to its end, or lost its metadata.json"


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end.

    Raises:
        UserError: its folder may not be read.
    """
    try:
        return (checkpoint / "metadata.json").exists()
    except PermissionError:
        raise UserError(f"{checkpoint}: may not be read; change its permissions") from None


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a run's ``checkpoints``, or where its link leads; None where there is none."""
    return next(iter(_complete_ones(directory)), None)


def holds_checkpoints(directory: Path) -> bool:
    """Whether a directory holds checkpoints, complete or not, or traces of some."""
    return bool(_remains(directory))


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
    """Number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step_")) if checkpoint.name.startswith("step_") else 0


def point_latest(checkpoint: Path) -> None:
    """Move the link ``latest`` beside a checkpoint to it."""
    fresh = checkpoint.with_name(_LATEST + ".new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(checkpoint.name)
    os.replace(fresh, checkpoint.with_name(_LATEST))


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that no run finds it, and return its new path.

    Raises:
        UserError: its folder cannot be written.
    """
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged.{number}")
    try:
        return checkpoint.rename(aside)
    except OSError as error:
        raise cannot_write(checkpoint.parent, error) from error


def _steps(directory: Path) -> list[Path]:
    """Checkpoints in a directory, oldest first, complete or not."""
    return sorted(filter(_is_step, directory.glob("step_*")), key=step_of)


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"step_\d+", path.name) is not None


def _complete_ones(directory: Path) -> list[Path]:
    """Complete checkpoints in a directory, and where its link leads, newest first."""
    linked = Path(os.path.realpath(directory / _LATEST))
    found = dict.fromkeys(path.resolve() for path in (*_steps(directory), *filter(_is_step, [linked])))
    return sorted(filter(is_complete, found), key=step_of, reverse=True)


def _remains(directory: Path) -> list[Path]:
    """Traces of a run's checkpoints: those set aside too, and a link that leads nowhere."""
    aside = [path for path in sorted(directory.glob("step_*.damaged*")) if path.is_dir()]
    link = directory / _LATEST
    return [*aside, *([Path(os.path.realpath(link))] if os.path.lexists(link) else []), *_steps(directory)]


def attempt(write: Callable[[], None]) -> str | None:
    """Error that stopped a write, in words; None where it succeeded."""
    try:
        write()
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        return describe(error)
    return None


def describe(error: BaseException) -> str:
    """Error that stopped a write, in words, with the rank that it came up on."""
    where = f"rank {platform.rank()}: " if platform.world_size() > 1 else ""
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"{where}{kind}{first_line(error)}"


class Store:
    """Base of the two engines' stores of checkpoints. Process groups must exist.

    A checkpoint that cannot be written costs a warning; `config.max_failures` in a row raise ``RunFailed``, by whatever
    call of :meth:`save` or :meth:`finish` learns it, on all ranks.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory, self.config = directory, config
        self.failures = 0  # saves in a row that could not be written
        self.last: int | None = None  # step of the newest checkpoint that this run has written, or found written
        self.guard: Callable[[], None] = lambda: None  # collective; refuses to write where the run is another's by now
        self.saved: Callable[[], None] = lambda: None  # called on the first rank when a checkpoint is complete
        on_first_rank(self._prepare)

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.directory, error) from error
        self._remove_partial("*")

    def _remove_partial(self, names: str = "step_*") -> None:
        for leftover in self.directory.glob(names + _PARTIAL):
            shutil.rmtree(leftover, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest intact checkpoint, to resume from; None where a run has none yet. Collective.

        Newer ones that are damaged or incomplete are set aside, and named in a warning.

        Raises:
            UserError: there are checkpoints, but none that a run can resume from.
        """
        candidates = on_first_rank(self._candidates)
        damage: dict[Path, str] = {}
        for found in candidates:
            if (problem := find_damage(found, self.config.verify)) is None:
                break
            damage[found] = problem
        else:
            if not candidates:
                return None
            remedy = f"there is no other to go on from: restore it, or remove {self.directory.parent} to start anew"
            raise damaged(candidates[0], damage[candidates[0]], remedy)
        on_first_rank(lambda: self._go_on_from(found, damage))
        return found

    def _candidates(self) -> list[Path]:
        """Complete checkpoints of the run, newest first."""
        link = self.directory / _LATEST
        if link.is_dir() and not link.is_symlink():
            raise UserError(
                f"{link}: is a folder, not a link; remove it where it is a copy of the newest step_XXXXXXXX beside it, "
                "or else give it the name of the step that it holds"
            )
        candidates = _complete_ones(self.directory)
        if not candidates and (remains := _remains(self.directory)):
            raise UserError(
                f"{remains[-1]}: not a complete checkpoint, and there is no other to go on from; restore it, or remove "
                f"{self.directory.parent} to start anew"
            )
        return candidates

    def _go_on_from(self, found: Path, damage: dict[Path, str]) -> None:
        newer = [path for path in _steps(self.directory) if step_of(path) > step_of(found)]
        incomplete = {path: _INCOMPLETE for path in newer if not is_complete(path)}
        for checkpoint, problem in (incomplete | damage).items():
            aside = set_aside(checkpoint)
            warn(f"{checkpoint}: damaged: {problem}; set aside as {aside.name}, {found.name} is taken in its place")
        link = self.directory / _LATEST
        if Path(os.path.realpath(link)) != found:
            warn(f"{link}: does not lead to the newest complete checkpoint, {found.name}; now it does")
            self._link(found)

    def _link(self, checkpoint: Path) -> None:
        """Point the link ``latest`` to a checkpoint; a run can do without it, so it may fail."""
        try:
            point_latest(self.directory / checkpoint.name)
        except OSError as error:
            warn(f"{self.directory / _LATEST}: cannot be moved to {checkpoint.name}: {error.strerror}")

    def finish(self, blocking: bool = False) -> None:
        """Complete checkpoints whose files are written; with `blocking`, wait for all of them. Collective."""

    def close(self) -> None:
        """Wait for the last write. Collective."""
        self.finish(blocking=True)

    def abandon(self) -> None:
        """Stop a write that is under way, if any. Not collective: for a run that ends by an error."""

    @staticmethod
    def loader_states(checkpoint: Path) -> list:
        """States of the loaders of all data ranks that wrote a checkpoint, in their order.

        Raises:
            DamagedCheckpoint: a state is not there, or cannot be read.
        """
        states = [read_state(path) for path in sorted(checkpoint.glob("loader_*.pt"))]
        if not states or len(states) != states[0]["world_size"]:
            raise damaged(checkpoint, "lacks files loader_XXXXX.pt")
        return states

    def _begin(self, step: int) -> tuple[Path, Path] | None:
        """(directory to write to, final directory) of a checkpoint; None where it exists or cannot be. Collective."""
        self.guard()
        final = self.directory / f"step_{step:08d}"
        partial = final.with_name(final.name + _PARTIAL)

        def make() -> None:
            self._remove_partial()
            if os.path.lexists(final):
                set_aside(final)
            partial.mkdir(parents=True)

        there, problem = on_first_rank(lambda: (True, None) if is_complete(final) else (False, attempt(make)))
        if there:
            self.last = step
        elif problem:
            self._failed(final, problem)
        return None if there or problem else (partial, final)

    @staticmethod
    def _write_loader(partial: Path, loader_state: Any) -> list[str]:
        """Write the state of this rank's loader, where it has one; returns the names of the files."""
        if loader_state is None:
            return []
        name = f"loader_{platform.parallel.data_rank():05d}.pt"
        write_state(partial / name, loader_state)
        return [name]

    def _complete(
        self, partial: Path, final: Path, digests: Digests, results: object = None, seal: Callable | None = None
    ) -> None:
        """Make a complete checkpoint of what all ranks have written. Collective.

        Args:
            partial: directory that the ranks have written to.
            final: directory that it becomes.
            digests: digests of the files that this rank has written; the first rank computes those of other files.
            results: anything that the first rank needs from this one.
            seal: called on the first rank with the results of all ranks, to write what is left to write.
        """
        self.guard()
        parts = gathered((digests, results))

        def write() -> None:
            assert parts is not None  # on the first rank, which alone writes here
            if seal is not None:
                seal([part for _, part in parts])
            write_digests(partial, {name: digest for known, _ in parts for name, digest in known.items()})
            partial.rename(final)

        if problem := on_first_rank(lambda: attempt(write)):
            self._failed(final, problem)
            return
        self.failures, self.last = 0, step_of(final)
        on_first_rank(lambda: self._completed(final))

    def _completed(self, final: Path) -> None:
        """Link a checkpoint that was completed, and remove old ones; on the first rank."""
        self.saved()
        self._link(final)
        if problem := attempt(lambda: self._prune(final)):
            warn(f"{self.directory}: older checkpoints cannot be removed: {problem}")

    def _failed(self, final: Path, problem: str) -> None:
        """Count a checkpoint that could not be written, which the ranks have agreed on."""
        self.failures += 1
        if platform.rank() == 0:
            self._remove_partial()
        allowed, what = self.config.max_failures, f"{final}: could not be written: {problem}"
        if self.failures >= allowed:
            last = f"; it is the last of checkpoint.max_failures={allowed} in a row, and ends the run"
            raise RunFailed(what + last * (allowed > 1))
        warn(f"{what}; the next save tries again ({self.failures} of {allowed} in a row)")

    def _prune(self, written: Path) -> None:
        """Remove all but the newest `keep` checkpoints up to the one just written."""
        if not self.config.keep:
            return
        older = [path for path in _steps(self.directory) if step_of(path) <= step_of(written)]
        kept = list(filter(is_complete, older))[-self.config.keep :]
        linked = Path(os.path.realpath(self.directory / _LATEST))
        for old in older:
            if step_of(old) < step_of(kept[0]) and old.resolve() != linked:
                (old / "metadata.json").unlink(missing_ok=True)  # incomplete from here on, should this be interrupted
                shutil.rmtree(old)
