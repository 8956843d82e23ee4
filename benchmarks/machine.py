"""Effect of the settings of omni_train/machine.py, run by hand: ``python -m benchmarks.machine [TOKENS [ROUNDS]]``.

Four steps of the tiny Thinker on rows of TOKENS, each time in a process that has the settings: none, memory kept, and
MKL at full width beside it. They take turns, so that a busy machine slows all. Printed are medians of whole
runs: processor seconds as a ratio to those without settings of the same round, page faults, seconds in the kernel, the
peak; and whether the losses are the same to the bit.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from omni_train import machine

STEPS = 4


def environments() -> dict[str, dict[str, str]]:
    """Environments that are compared, by name."""
    os.environ.pop(machine.FULL_WIDTH, None)
    kept = machine.environment(1)
    os.environ[machine.FULL_WIDTH] = "1"
    wide = machine.environment(1)
    del os.environ[machine.FULL_WIDTH]
    return {"none": dict(os.environ), "memory kept": kept, "full width too": wide}


def run(environment: dict[str, str], tokens: int) -> dict:
    """Measurements of one run: processor seconds, page faults, seconds in the kernel, peak in MiB, losses."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"data.row_tokens={tokens}", "schedule.global_batch=1", "data.streams=1", "data.workers=1"]
        words += [f"schedule.steps={STEPS}", "schedule.eval_every=0", f"runs_dir={folder}", "run=run"]
        command = [sys.executable, "-m", "omni_train", "train", *words]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)}: failed")
        steps = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": usage.ru_utime + usage.ru_stime,
        "faults": usage.ru_minflt,
        "kernel": usage.ru_stime,
        "peak": usage.ru_maxrss >> 10,
        "losses": [step["loss"] for step in steps],
    }


def main(tokens: int = 8192, rounds: int = 5) -> None:
    """Print a table of all measurements."""
    compared = environments()
    runs: dict[str, list[dict]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, environment in compared.items():
            runs[name].append(run(environment, tokens))
    for name, ours in runs.items():
        ratio = statistics.median(
            one["seconds"] / none["seconds"] for one, none in zip(ours, runs["none"], strict=True)
        )
        faults, kernel, peak = (statistics.median(one[key] for one in ours) for key in ("faults", "kernel", "peak"))
        same = all(one["losses"] == runs["none"][0]["losses"] for one in ours)
        print(
            f"{name}: {ratio:.3f} of the time, {faults:,.0f} faults, {kernel:.1f} s in the kernel, {peak:,.0f} MiB, ",
            end="",
        )
        print("same losses" if same else "other losses")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
