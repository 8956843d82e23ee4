"""Making of shards by several processes; a command that was stopped goes on where it was."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from omni_train.errors import UserError
from omni_train.locks import DirectoryLock
from omni_train.processes import Exit, die_with_parent


@dataclass(frozen=True)
class Making:
    """Notes of a folder of shards that are being made, in its folder ``.DONE``.

    ``settings.json`` says how the shards are made, and each finished one has a record; one without it is made again.
    """

    out: Path
    done: str  # what has happened to a finished shard: packed, coded

    @property
    def notes(self) -> Path:
        """Folder of the notes, whose lock is held by whoever makes shards."""
        return self.out / f".{self.done}"

    def claim(self, settings: dict[str, Any]) -> None:
        """Note how the shards of this folder are made.

        Raises:
            UserError: the folder holds other files, or shards that were made with other settings.
        """
        note = self.notes / "settings.json"
        if not note.exists():
            if self.out.exists() and not self.out.is_dir():
                raise UserError(f"out={self.out} is no folder; name another")
            if self.out.exists() and any(path != self.notes for path in self.out.iterdir()):
                raise UserError(
                    f"out={self.out} is not empty and was not {self.done} by this command; name another folder"
                )
            self.notes.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if not note.exists():  # of two commands at once, one says how
                    write_json(note, settings)
        before = json.loads(note.read_text())
        for key, value in settings.items():
            if before.get(key) != value:
                raise UserError(
                    f"out={self.out}: {self.done} there with another {key}; name another folder, or remove it"
                )

    def make(
        self,
        write: Callable,
        jobs: dict[str, tuple],
        processes: int,
        *,
        initializer: Callable | None = None,
        initargs: tuple = (),
        **pool,
    ) -> None:
        """Call ``write(*arguments)`` for every shard that has no record yet; the call writes it last.

        Args:
            write: function, importable by name.
            jobs: shard -> arguments of the function.
            processes: number of processes; 0 for one per core. They end with this one, however that ends.
            initializer: called first in each process, importable by name.
            initargs: its arguments.
            pool: other options of ``ProcessPoolExecutor``.

        Raises:
            UserError: a process was killed, or the same command is still running elsewhere.
        """
        with self._alone():
            todo = [jobs[shard] for shard in self.left(jobs)]
            try:
                pool |= {"initializer": _begin, "initargs": (initializer, initargs)}
                with ProcessPoolExecutor(processes or os.cpu_count(), **pool) as executor:
                    futures = [executor.submit(write, *arguments) for arguments in todo]
                    for future in track(as_completed(futures), "shards", total=len(futures)):
                        future.result()
            except BrokenProcessPool:
                raise UserError(
                    f"out={self.out}: a process was killed (memory?); the same command goes on from here"
                ) from None

    def left(self, shards: Iterable[str]) -> list[str]:
        """Shards that have no record yet; what a command that was stopped has begun of them is removed."""
        for leftover in self.notes.glob("*.partial"):
            leftover.unlink()
        return [shard for shard in shards if not self._record(shard).exists()]

    def partial(self, shard: str) -> Path:
        """Path that this process writes a shard to; a process of a command that was killed may still write the same."""
        return self.notes / f"{shard}.{os.getpid()}.partial"

    def record(self, shard: str, fields: dict[str, Any]) -> None:
        """Note that a shard is complete, with facts about it."""
        write_json(self._record(shard), fields)

    def records(self, shards: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Facts that were noted of shards, by shard."""
        return {shard: json.loads(self._record(shard).read_text()) for shard in shards}

    def _alone(self) -> DirectoryLock:
        return DirectoryLock(self.notes, remedy="name another folder")

    def _record(self, shard: str) -> Path:
        return self.notes / f"{shard}.json"


def _begin(initializer: Callable | None, initargs: tuple) -> None:
    die_with_parent()
    if not multiprocessing.parent_process().is_alive():  # since before that
        os._exit(Exit.failed)
    if initializer is not None:
        initializer(*initargs)


def write_json(file: Path, fields: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    fresh = file.with_name(f"{file.name}.new")
    fresh.write_text(json.dumps(fields, indent=1) + "\n")
    os.replace(fresh, file)
