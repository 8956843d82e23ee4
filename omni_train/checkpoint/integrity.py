"""Digests of a checkpoint's files, computed while they are written, and the damage that they show.

``digests.json`` in a checkpoint names every other file of it with its size in bytes and the SHA-256 of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Buffer, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path

from omni_train import platform
from omni_train.errors import UserError, first_line
from omni_train.platform.agreement import agree, on_first_rank
from omni_train.platform.logs import warn
from omni_train.recipe.schema import Verify

DIGESTS = "digests.json"
_TENSORS = ("*.distcp", "*.safetensors", "zero/*")  # large files
_FOREIGN = (".nfs*", "._*", ".DS_Store")  # files that file systems put beside ours
_CHUNK = 1 << 24

Digests = dict[str, tuple[int, str]]
"""Name of a file in its checkpoint -> bytes, and SHA-256 in hexadecimal."""


class DamagedCheckpoint(UserError):
    """Error of a checkpoint in the directory `checkpoint`: a file is not as it was written, and `damage` names it."""

    checkpoint: Path | None = None
    damage = ""


def damaged(checkpoint: Path, damage: str, remedy: str = "restore it, or use another") -> DamagedCheckpoint:
    """Error that says what of a checkpoint is damaged, and what to do.

    Args:
        checkpoint: directory of the checkpoint.
        damage: the file, and what is wrong with it.
        remedy: what the user can do.
    """
    error = DamagedCheckpoint(f"{checkpoint}: damaged: {damage}; {remedy}")
    error.checkpoint, error.damage = checkpoint, damage
    return error


class HashedFile:
    """A new file that is written from start to end, and the digest of its content.

    Args:
        path: path of the new file.
        cancelled: once set, the next write raises.

    Raises:
        OSError: by any method, and also on leaving the context, when the file is not on disk.
    """

    def __init__(self, path: Path, cancelled: threading.Event | None = None) -> None:
        self._file, self._sha256, self._size = path.open("wb"), hashlib.sha256(), 0
        self._cancelled = cancelled
        self._error: OSError | None = None

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            if self._cancelled is not None and self._cancelled.is_set():
                raise InterruptedError("the write was cancelled")
            part = view[start : start + _CHUNK]
            try:
                self._file.write(part)
            except OSError as error:
                self._error = error  # torch raises another error in its place
                raise
            self._sha256.update(part)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> tuple[int, str]:
        return self._size, self._sha256.hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if self._error is not None:
                raise self._error
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def digests_of(folder: Path, names: Iterable[str]) -> Digests:
    """Digests of files that were just written; when it returns, the files are on disk.

    Raises:
        OSError: a file cannot be read, or could not be written after all.
    """
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            sha256 = _sha256(file)
            os.fsync(file.fileno())
            digests[name] = (file.tell(), sha256)
    return digests


def write_digests(checkpoint: Path, known: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Write ``digests.json``, the last file of a checkpoint.

    Args:
        checkpoint: directory of the checkpoint.
        known: digests that are known already; the other files are read.

    Raises:
        OSError: a file cannot be read, or ``digests.json`` cannot be written.
    """
    digests = dict(known or {})
    digests |= digests_of(checkpoint, sorted(_files(checkpoint) - digests.keys()))
    with (checkpoint / DIGESTS).open("w") as file:
        json.dump(dict(sorted(digests.items())), file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def read_digests(checkpoint: Path) -> Digests | None:
    """Digests that a checkpoint was written with; None where it has none.

    Raises:
        DamagedCheckpoint: they cannot be read.
    """
    try:
        written = json.loads((checkpoint / DIGESTS).read_bytes())
        return {str(name): (int(size), str(sha256)) for name, (size, sha256) in written.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(checkpoint, f"{DIGESTS} cannot be read: {first_line(error)}") from error


def find_damage(checkpoint: Path, how: Verify, only: Iterable[str] | None = None, together: bool = True) -> str | None:
    """Damage of a checkpoint, in words that begin with a file; None where there is none.

    Args:
        checkpoint: directory of the checkpoint.
        how: how much is verified: names and sizes, contents, or nothing.
        only: glob patterns of the file names to verify; None for all files, and that there are no others.
        together: whether the ranks share the files among them, which is collective; else this process reads them all.

    Raises:
        UserError: a file may not be read.
    """
    if how is Verify.none:
        return None
    patterns = None if only is None else tuple(only)

    def survey() -> tuple[str | None, Digests]:
        return _survey(checkpoint, how, patterns)

    damage, files = on_first_rank(survey) if together else survey()
    if damage or not together:
        return damage or _compare(checkpoint, files)
    names = sorted(files, key=lambda name: files[name])  # by size, so that the ranks' shares are about equal
    mine = names[platform.rank() :: platform.world_size()]
    return agree(_compare(checkpoint, {name: files[name] for name in mine}))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Context around reading one file of a checkpoint.

    Raises:
        DamagedCheckpoint: an error of any kind came up in it.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise damaged(path.parent, f"{path.name} cannot be read: {first_line(error)}") from error


def require_intact(checkpoint: Path, how: Verify, only: Iterable[str] | None = None, together: bool = True) -> None:
    """Refuse a damaged checkpoint; the arguments are those of :func:`find_damage`.

    Raises:
        DamagedCheckpoint: it names the first file that is not as it was written.
    """
    if damage := find_damage(checkpoint, how, only, together):
        raise damaged(checkpoint, damage)


def _survey(checkpoint: Path, how: Verify, only: tuple[str, ...] | None) -> tuple[str | None, Digests]:
    """Damage that names and sizes show, and the digests of the files whose content is still to be compared."""
    try:
        written = read_digests(checkpoint)
        if written is None:
            if _older_with_digests(checkpoint):
                return f"{DIGESTS} is missing", {}
            warn(f"{checkpoint}: has no {DIGESTS}, as none had that were written before: damage will not be noticed")
            return None, {}
        if only is not None:
            written = {name: digest for name, digest in written.items() if _matches(name, only)}
        here = _files(checkpoint)
        for name, (size, _) in written.items():
            if name not in here:
                return f"{name} is missing", {}
            if not os.access(checkpoint / name, os.R_OK):
                raise UserError(f"{checkpoint / name}: may not be read; change its permissions")
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found} bytes, not {size}", {}
        if only is None and (more := sorted(name for name in here - written.keys() if not _foreign(name))):
            return f"{more[0]} was not there when it was written", {}
    except DamagedCheckpoint as error:
        return error.damage, {}
    except OSError as error:
        return _unreadable(error), {}
    return None, {name: of for name, of in written.items() if how is Verify.all or not _matches(name, _TENSORS)}


def _older_with_digests(checkpoint: Path) -> bool:
    """Whether a checkpoint of an earlier step beside this one has digests: then this one has had some too."""
    return any(path.parent.name < checkpoint.name for path in checkpoint.parent.glob(f"step_????????/{DIGESTS}"))


def _compare(checkpoint: Path, files: Digests) -> str | None:
    for name, (_, sha256) in files.items():
        try:
            with (checkpoint / name).open("rb") as file:
                found = _sha256(file)
        except OSError as error:
            return _unreadable(error)
        if found != sha256:
            return f"{name} does not have the digest that it was written with"
    return None


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(error: OSError) -> str:
    return f"{Path(error.filename or '').name} cannot be read: {error.strerror or first_line(error)}"


def _files(checkpoint: Path) -> set[str]:
    """Names of the files of a checkpoint, without ``digests.json``."""
    names = {
        str(Path(folder, name).relative_to(checkpoint)) for folder, _, names in os.walk(checkpoint) for name in names
    }
    return names - {DIGESTS}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _foreign(name: str) -> bool:
    return _matches(Path(name).name, _FOREIGN)
