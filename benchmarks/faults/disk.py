"""Faults of files: damaged checkpoints, a full disk, files that cannot be written; and a lost loader."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.faults.start import Start
from benchmarks.faults.trial import LONE, SAVE_EVERY, STEPS, TENSOR, ZERO, Layout, Trial, Wrong

Job = tuple[Layout, Callable[[Trial], None]]


# Damaged checkpoints


def damages(count: int, random) -> list[Job]:
    """Jobs that damage the newest three checkpoints of finished runs, and start them again."""
    turns: Counter[str] = Counter()
    jobs: list[Job] = []
    for number, size in enumerate(min(3, count - at) for at in range(0, count, 3)):
        layout = [LONE, ZERO, LONE, ZERO, None][number % 5]
        turn = turns[layout]
        turns[layout] += 1
        if layout is None:
            jobs.append((LONE, lambda trial, turn=turn: _what_is_beside(trial, turn)))
        else:
            jobs.append((layout, lambda trial, turn=turn, size=size: _damaged(trial, 3 * turn, size)))
    return jobs


def _damaged(trial: Trial, first: int, size: int) -> None:
    """Damage the newest `size` checkpoints, each in its own way, from the `first` on."""
    checkpoints = _copy(trial)
    ways = _ways(checkpoints / f"step_{STEPS:08d}")
    damaged = {}
    for at in range(size):
        checkpoint = checkpoints / f"step_{STEPS - at * SAVE_EVERY:08d}"
        kind, how = ways[(first + at) % len(ways)]
        path = trial.random.choice([path for path in _files(checkpoint) if _kind(checkpoint, path) == kind])
        _damage(path, how, trial.random)
        damaged[checkpoint.name] = f"{kind} {how}"
        trial.faults[damaged[checkpoint.name]] += 1
    trial.moment = ", ".join(damaged.values())
    start = trial.start()
    trial.finished(start)
    for name, what in damaged.items():
        if not start.warned(name):
            trial.wrong(Wrong.silent, f"no WARNING names {name}, whose {what}")


def _ways(checkpoint: Path) -> list[tuple[str, str]]:
    """(kind of file, damage) of each: every kind is missing once; the large ones are also cut and changed."""
    sizes: dict[str, int] = {}
    for path in _files(checkpoint):
        sizes[_kind(checkpoint, path)] = path.stat().st_size
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    large = [kind for kind in kinds if sizes[kind] > 1_000_000]
    changed = [(kind, how) for kind in large for how in ("flipped", "cut")]
    small = [(kind, how) for kind in kinds if kind not in large for how in ("flipped", "cut")]
    return changed + [(kind, "missing") for kind in kinds] + small


def _files(checkpoint: Path) -> list[Path]:
    """Files of a checkpoint that hold state; DeepSpeed leaves scripts beside them."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.suffix != ".py")


def _kind(checkpoint: Path, path: Path) -> str:
    return re.sub(r"\d+", "N", str(path.relative_to(checkpoint)))


def _damage(path: Path, how: str, random) -> None:
    size = path.stat().st_size
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, random.randrange(size))
    else:
        with path.open("r+b") as file:
            file.seek(random.randrange(size // 10, size))  # mostly tensors
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << random.randrange(8)]))


def _what_is_beside(trial: Trial, turn: int) -> None:
    """Lose the link ``latest``, and damage a line of the metrics."""
    checkpoints = _copy(trial)
    shutil.rmtree(checkpoints / f"step_{STEPS:08d}")
    dangling = turn % 2 == 0
    if not dangling:  # as it now is
        (checkpoints / "latest").unlink()
    metrics = checkpoints.with_name("metrics.jsonl")
    lines = metrics.read_bytes().splitlines(keepends=True)
    at = trial.random.randrange(1, STEPS - SAVE_EVERY - 1)
    middle = len(lines[at]) // 2
    lines[at] = b"\xff" + lines[at][1:] if dangling else lines[at][:middle] + b"\n"
    metrics.write_bytes(b"".join(lines))
    trial.moment = f"latest {'dangling' if dangling else 'gone'}, line {at + 1} of the metrics broken"
    trial.faults.update([f"latest {'dangling' if dangling else 'gone'}", "metrics.jsonl broken"])
    trial.finish(missing=frozenset({at + 1}))


def _copy(trial: Trial) -> Path:
    """Copy the reference's run as the trial's own; returns the folder of its checkpoints."""
    shutil.copytree(trial.reference.folder, trial.runs_dir, symlinks=True)
    return trial.run() / "checkpoints"


# What cannot be written, and a loader that is lost


def losses(count: int, random) -> list[Job]:
    """Jobs that take something from a run while it goes on: room on the disk, the right to write, a loader."""
    kinds: list[Job] = [
        (LONE, _failing_writes),
        (LONE, _full_disk),
        (LONE, _read_only_folder),
        (TENSOR, _loader_killed),
        (ZERO, _failing_writes),
        (LONE, _no_last_save),
        (LONE, _loader_killed),
        (TENSOR, _failing_writes),
    ]
    return [kinds[number % len(kinds)] for number in range(count)]


def _go_on(trial: Trial, fault: contextlib.AbstractContextManager, start: Start) -> None:
    """Keep up a fault from a step on until the run warns of it."""
    if start.until(lambda: trial.steps(start) >= 1):
        with fault:
            trial.faults[trial.moment] += 1
            if not start.until(lambda: start.warned("checkpoints/step_")):
                trial.wrong(Wrong.end, "the run ended, or did not warn of the save that failed")
    if trial.ended(start, {0}):
        trial.finish()  # which it can at least do when it is mended


def _failing_writes(trial: Trial) -> None:
    """Let the kernel refuse the ranks' writing of large files, which checkpoints are."""
    trial.moment = "writes fail while it saves"
    start = trial.start()
    _go_on(trial, _limited(start), start)


@contextlib.contextmanager
def _limited(start: Start) -> Iterator[None]:
    _limit(start, 100_000)
    try:
        yield
    finally:
        _limit(start, resource.RLIM_INFINITY)


def _limit(start: Start, size: int) -> None:
    """Let no rank of a start, its threads and what it forks from here on, write files longer than `size` bytes."""
    for rank in start.ranks():
        with contextlib.suppress(psutil.Error):
            _, most = rank.rlimit(resource.RLIMIT_FSIZE)
            rank.rlimit(resource.RLIMIT_FSIZE, (size if most == resource.RLIM_INFINITY else min(size, most), most))


def _no_last_save(trial: Trial) -> None:
    """Let writes fail to the end: a run without its last checkpoint must not have finished."""
    trial.moment = "writes fail to the end"
    start = trial.start()
    start.until(lambda: trial.newest() >= STEPS - 2 * SAVE_EVERY)
    with _limited(start):
        trial.faults[trial.moment] += 1
        trial.ended(start, {1})
    trial.finish()


def _full_disk(trial: Trial) -> None:
    trial.moment = "a full disk"
    trial.runs_dir.mkdir()
    if not _may("mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", trial.runs_dir):
        trial.skipped = "needs the right to mount a small disk"
        return
    try:
        start = trial.start()
        _go_on(trial, _full(trial.runs_dir), start)
    finally:
        _may("umount", "--lazy", trial.runs_dir)


@contextlib.contextmanager
def _full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def _read_only_folder(trial: Trial) -> None:
    trial.moment = "the folder of checkpoints is read-only"
    trial.folder.joinpath("try").mkdir()
    with _read_only(trial.folder / "try") as works:
        if not works:
            trial.skipped = "root needs chattr and a file system that knows it"
            return
    start = trial.start()
    _go_on(trial, _read_only(trial.run() / "checkpoints"), start)


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[bool]:
    """Context in which nobody can write into a folder, not even root; False where that could not be done."""
    folder.chmod(0o555)
    works = os.geteuid() != 0 or _may("chattr", "+i", folder)
    try:
        yield works
    finally:
        if os.geteuid() == 0:
            _may("chattr", "-i", folder)
        folder.chmod(0o755)


def _may(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _loader_killed(trial: Trial) -> None:
    trial.moment = "kill -9 of a loader"
    start = trial.start()
    if start.until(lambda: trial.steps(start) >= 2) and (loaders := _loaders(start)):
        trial.random.choice(loaders).send_signal(signal.SIGKILL)
        trial.faults[trial.moment] += 1
    else:
        trial.wrong(Wrong.end, "no loader was found")
    trial.finished(start)
    if not start.warned("SIGKILL"):
        trial.wrong(Wrong.end, "no WARNING of the loader")


def _loaders(start: Start) -> list[psutil.Process]:
    """Loader workers of a start: forked by a server, whose command line they keep."""
    found = {}
    for process in start.processes():
        with contextlib.suppress(psutil.Error):
            if any("omni_train.data.workers" in word for word in process.cmdline()):
                found[process.pid] = process, process.ppid()
    return [process for process, parent in found.values() if parent in found]
