"""``python -m benchmarks.faults``: put faults into runs, count what went wrong, and write ``docs/reliability.md``."""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.__main__ import machine
from benchmarks.faults.chain import interrupts, kills, signals
from benchmarks.faults.disk import damages, losses
from benchmarks.faults.start import ROOT, Hangs
from benchmarks.faults.trial import Reference, Trial, Wrong, make_reference, write_stages
from benchmarks.faults.twice import twice
from tests.support.tiny_runs import write_speech, write_world

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- make faults writes from here -->\n", "<!-- to here -->\n"
SCENARIOS: dict[str, tuple[Callable, int]] = {
    "kills": (kills, 50),
    "signals": (signals, 20),
    "interrupts": (interrupts, 10),
    "twice": (twice, 20),
    "damages": (damages, 36),
    "losses": (losses, 8),
}
"""Scenario -> function that makes its trials, and the number of its faults."""


def main(arguments: list[str] | None = None) -> int:
    """Run the scenarios; returns 1 where anything went wrong, and keeps the folders of those trials."""
    options = _parser().parse_args(arguments)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="omni_train_faults_", dir=options.folder))
    print(f"seed {options.seed}, {options.jobs} trials side by side, in {folder}", file=sys.stderr)
    world = folder / "world"
    world.mkdir()
    write_world(world)
    write_speech(world)
    write_stages(world)
    planned: list[tuple[Trial, Callable[[Trial], None]]] = []
    for scenario in options.only or SCENARIOS:
        plan, count = SCENARIOS[scenario]
        made = plan(options.trials or count, random.Random(f"{options.seed} {scenario}"))
        for number, (layout, job) in enumerate(made, start=1):
            draws = random.Random(f"{options.seed} {scenario} {number}")
            trial = Trial(scenario, f"{number}", layout, world, folder / f"{scenario}_{number:02d}", draws)
            planned.append((trial, job))
    with ThreadPoolExecutor(options.jobs) as pool:
        layouts = dict.fromkeys(trial.layout for trial, _ in planned)
        folders = [folder / f"untouched_{number}" for number in range(len(layouts))]
        references = dict(zip(layouts, pool.map(make_reference, layouts, [world] * len(layouts), folders), strict=True))
        list(pool.map(lambda plan: _try(*plan, references[plan[0].layout], options.seed), planned))
    trials = [trial for trial, _ in planned]
    minutes = (time.monotonic() - began) / 60
    result = report(trials, f"seed {options.seed}, {options.jobs} trials side by side, {minutes:.0f} min")
    print(result)
    broken = [trial for trial in trials if trial.problems]
    if not (options.only or options.trials):  # a part would leave a page with results of different days
        write(PAGE, result)
    if not broken:
        shutil.rmtree(folder)
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="a scenario; may be given again")
    parser.add_argument("--trials", type=int, help="faults of each scenario")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of all that is drawn")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--folder", help="where the runs go; a folder of their own in the system's temporary one")
    return parser


def _try(trial: Trial, job: Callable[[Trial], None], reference: Reference, seed: int) -> None:
    trial.reference = reference
    began = time.monotonic()
    try:
        job(trial)
    except Hangs as hang:
        trial.wrong(Wrong.end, str(hang))
    except Exception as error:
        trial.wrong(Wrong.end, f"the trial itself failed, by {type(error).__name__}: {error}")
        traceback.print_exc()
    finally:
        trial.end()
    for problem in trial.problems:
        print(f"WRONG seed {seed}, {problem} (see {trial.folder})", file=sys.stderr, flush=True)
    if not trial.problems:
        shutil.rmtree(trial.folder)
    done = trial.skipped or f"{trial.faults.total()} faults, {trial.counts['starts']} starts"
    seconds = time.monotonic() - began
    print(f"{trial.scenario} {trial.name}, {trial.layout.name}: {done}, {seconds:.0f} s", file=sys.stderr, flush=True)


def report(trials: list[Trial], how: str) -> str:
    """Table of all scenarios, and under it the faults of each."""
    columns = ["faults", "starts", "steps compared", *Wrong]
    here, _, _ = machine().rpartition(", ")  # without its threads: the runs have one each
    lines = [f"{here}; commit {_commit()}, {how}.", ""]
    lines += [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    kinds = []
    for scenario in dict.fromkeys(trial.scenario for trial in trials):
        mine = [trial for trial in trials if trial.scenario == scenario]
        counts, faults = (
            sum((trial.counts for trial in mine), Counter()),
            sum((trial.faults for trial in mine), Counter()),
        )
        counted = [faults.total(), counts["starts"], counts["steps"], *(counts[kind] for kind in Wrong)]
        lines.append(f"| {scenario} | {' | '.join(f'{count:,}' for count in counted)} |")
        named = [f"{name} ×{times}" if times > 1 else name for name, times in sorted(faults.items())]
        named += [f"{trial.moment} was not tried: {trial.skipped}" for trial in mine if trial.skipped]
        kinds.append(f"- **{scenario}**: {'; '.join(named)}.")
    return "\n".join([*lines, "", *kinds]) + "\n"


def write(page: Path, result: str) -> None:
    """Replace the last result in a page by a new one."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{result}\n{END}{after}")


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")


if __name__ == "__main__":
    sys.exit(main())
