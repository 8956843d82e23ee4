"""Trial: a run that faults are put into, started again and again, and compared with a run without faults."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from benchmarks.faults.start import ROOT, Start
from tests.support.tiny_runs import recognizer, thinker

STEPS, SAVE_EVERY, KEEP, EVAL_EVERY = 16, 2, 4, 5
STAGE_STEPS = 4  # of each stage of a pipeline
COMPARED = ("loss", "grad_norm", "tokens", "eval_loss")


class Wrong(StrEnum):
    """Kinds of wrong behaviour, as the table counts them."""

    end = "wrong ends"
    lost = "runs lost"
    silent = "silent restarts"
    left = "processes left"
    unequal = "steps unequal"


@dataclass(frozen=True)
class Layout:
    """Command on some ranks."""

    name: str
    ranks: int
    begin: Callable[[Path], list[str]]  # the first words, on a world
    stages: tuple[str, ...] = ("",)  # folders of runs within the run

    @property
    def steps(self) -> int:
        """Steps of each stage."""
        return STEPS if self.stages == ("",) else STAGE_STEPS

    def command(self, world: Path, runs_dir: Path) -> list[str]:
        watched = [f"schedule.eval_every={EVAL_EVERY}", "schedule.eval_rows=2"]
        saved = [f"checkpoint.save_every={SAVE_EVERY}", f"checkpoint.keep={KEEP}", f"runs_dir={runs_dir}", "run=run"]
        words = [*self.begin(world), *watched, *saved, f"schedule.steps={self.steps}"]
        if self.ranks > 1:
            return [str(ROOT / "launchers" / "local.sh"), str(self.ranks), *words]
        return [sys.executable, "-m", "omni_train", *words]


LONE = Layout("one process", 1, lambda world: ["train", *thinker(world)])
TENSOR = Layout("2 tensor ranks", 2, lambda world: ["train", *thinker(world), "parallel.tensor=2"])
ZERO = Layout("ZeRO, 2 data ranks", 2, lambda world: ["train", *recognizer(world)])
PIPELINE = Layout(
    "pipeline",
    2,
    lambda world: ["pipeline", f"name={world}/stages.yaml", "parallel.tensor=2"],
    stages=("first", "second", "third", "fourth"),
)


def write_stages(world: Path) -> None:
    """Write the pipeline's file beside the world's shards."""
    stages = {name: ["stage=text_pretrain"] for name in PIPELINE.stages}
    (world / "stages.yaml").write_text(json.dumps({"all": thinker(world), "stages": stages}))  # which is YAML too


@dataclass
class Reference:
    """Reference: the run without faults."""

    folder: Path  # its runs_dir
    history: dict[str, dict[int, tuple]]  # of each stage, by step
    startup: float  # seconds until its first step was logged


@dataclass
class Before:
    """State of the run before a start."""

    newest: dict[str, int]  # the step of each stage's newest complete checkpoint
    metrics: dict[str, str]
    partial: set

    @property
    def step(self) -> int:
        """Number of saved steps, over all stages."""
        return sum(self.newest.values())


@dataclass
class Trial:
    """Trial: a run that faults are put into, in a folder of its own, and what was found wrong with it."""

    scenario: str
    name: str
    layout: Layout
    world: Path
    folder: Path
    random: random.Random
    reference: Reference | None = None
    moment: str = ""  # of the fault at hand
    skipped: str = ""  # why nothing was tried
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)  # starts, compared steps, and each kind of wrong
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.runs_dir = self.folder / "runs"
        self._starts: list[Start] = []

    def wrong(self, kind: Wrong, what: str, times: int = 1) -> None:
        self.counts[kind] += times
        self.problems.append(
            f"{self.scenario} {self.name}, {self.layout.name}, {self.moment or 'untouched'}: {kind}: {what}"
        )

    # What lies on disk

    def run(self, stage: str = "") -> Path:
        return self.runs_dir / "run" / stage

    def lines(self, stage: str = "") -> dict[int, tuple]:
        """Compared metrics of every step that a stage has logged; a line that a kill cut short does not count."""
        return history(self.run(stage) / "metrics.jsonl")

    def newest(self, stage: str = "") -> int:
        """Step of a stage's newest complete checkpoint."""
        complete = [path.parent.name[5:] for path in (self.run(stage) / "checkpoints").glob("step_*/metadata.json")]
        return max((int(step) for step in complete if step.isdecimal()), default=0)

    def partial(self) -> set[tuple[str, int]]:
        """Checkpoints that are being written, or were when a run was killed."""
        found = set()
        for stage in self.layout.stages:
            for path in (self.run(stage) / "checkpoints").glob("*.partial"):
                with contextlib.suppress(FileNotFoundError):
                    found.add((path.name, path.stat().st_ino))
        return found

    def steps(self, start: Start) -> int:
        """Steps behind a start, over all stages and those of earlier starts; -1 before it trains."""
        if all(raw(self.run(stage)) == before for stage, before in start.before.metrics.items()):
            return -1
        return sum(max(self.lines(stage), default=0) for stage in self.layout.stages)

    def nearly_done(self, start: Start) -> bool:
        """Whether so little is left that a fault may come too late."""
        return self.steps(start) >= self.layout.steps * len(self.layout.stages) - 1

    # Starts and ends

    def start(self, *, terminal: bool = False) -> Start:
        """Start the command of the run, again."""
        stages = self.layout.stages
        self.counts["starts"] += 1
        log = self.folder / f"start_{self.counts['starts']:02d}.log"
        metrics = {stage: raw(self.run(stage)) for stage in stages}
        before = Before({stage: self.newest(stage) for stage in stages}, metrics, self.partial())
        command = self.layout.command(self.world, self.runs_dir)
        self._starts.append(Start(command, log, before=before, terminal=terminal))
        return self._starts[-1]

    def end(self) -> None:
        """End all that still runs, whatever went wrong."""
        for start in self._starts:
            start.kill()

    def ended(self, start: Start, codes: set[int], *, missing: frozenset[int] = frozenset()) -> int:
        """Wait for the end of a start, and check all that must hold then; returns its exit code.

        Args:
            start: the start.
            codes: exit codes that are right.
            missing: steps that the metrics may lack.
        """
        code = start.exit_code()
        if code not in codes:
            self.wrong(Wrong.end, f"exit code {code}, not {' or '.join(map(str, sorted(codes)))}: {last_line(start)}")
        elif code in (0, 2, 75) and "Traceback" in start.said:
            self.wrong(Wrong.end, f"a stack trace, and exit code {code}")
        if left := start.left():
            self.wrong(Wrong.left, "; ".join(left), len(left))
        self._check_restart(start)
        self._compare(missing)
        return code

    def _check_restart(self, start: Start) -> None:
        """Check that a start that trained has resumed from the newest checkpoint, or named it in a warning."""
        for stage, newest in start.before.newest.items():
            if newest in (0, self.layout.steps) or raw(self.run(stage)) == start.before.metrics[stage]:
                continue
            found = re.search(rf"run/{stage}/?checkpoints/step_(\d+) at step", start.said)
            step = int(found[1]) if found else 0
            if step != newest and not start.warned(f"step_{newest:08d}"):
                self.wrong(Wrong.silent, f"at step {step}, where {stage} step_{newest:08d} was complete")

    def _compare(self, missing: frozenset[int]) -> None:
        if self.reference is None:
            return
        for stage in self.layout.stages:
            mine, whole = self.lines(stage), self.reference.history[stage]
            self.counts["steps"] += len(mine)
            if missed := set(range(1, max(mine, default=0))) - mine.keys() - missing:
                self.wrong(Wrong.unequal, f"{stage} metrics lack steps {sorted(missed)}", len(missed))
            if other := [step for step, metrics in mine.items() if metrics != whole.get(step)]:
                step = other[0]
                self.wrong(Wrong.unequal, f"{stage} step {step} has {mine[step]}, not {whole.get(step)}", len(other))

    def finish(self, *, missing: frozenset[int] = frozenset()) -> None:
        """Start the run again, and let it end."""
        self.moment += ", then the same command again"
        self.finished(self.start(), missing=missing)

    def finished(self, start: Start, *, missing: frozenset[int] = frozenset()) -> None:
        """Wait for a start that must end the run."""
        code = self.ended(start, {0}, missing=missing)
        for stage in self.layout.stages:
            logged, saved = max(self.lines(stage), default=0), self.newest(stage)
            if code or {logged, saved} != {self.layout.steps}:
                self.wrong(Wrong.lost, f"exit code {code}, {stage} logged to step {logged}, saved to step {saved}")

    def anew(self) -> None:
        """Remove the run, to begin another one."""
        shutil.rmtree(self.runs_dir)


def raw(run: Path) -> str:
    path = run / "metrics.jsonl"
    try:
        return f"{path.stat().st_mtime_ns} {path.read_text(errors='replace')}"
    except FileNotFoundError:
        return ""


def history(metrics: Path) -> dict[int, tuple]:
    """Compared metrics of every step in a ``metrics.jsonl``."""
    found = {}
    try:
        lines = metrics.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            logged = json.loads(line)
            found[logged["step"]] = tuple(logged.get(name) for name in COMPARED)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def last_line(start: Start) -> str:
    return next((line for line in reversed(start.said.splitlines()) if line.strip()), "it said nothing")[:300]


def make_reference(layout: Layout, world: Path, folder: Path) -> Reference:
    """Reference of a layout, run to its end without faults.

    Raises:
        RuntimeError: the run does not reach its end.
    """
    trial = Trial("reference", layout.name, layout, world, folder, random.Random(0))
    began = time.monotonic()
    start = trial.start()
    start.until(lambda: trial.steps(start) > 0)
    startup = time.monotonic() - began
    trial.finished(start)
    if trial.problems:
        raise RuntimeError(f"{trial.problems[0]}\n{start.said}")
    return Reference(trial.runs_dir, {stage: trial.lines(stage) for stage in layout.stages}, startup)
