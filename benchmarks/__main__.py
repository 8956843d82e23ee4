"""``python -m benchmarks [NAME …]``: run the benchmarks and write their results into ``docs/performance.md``."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

NAMES = ("delta_rule", "cross_entropy", "train_step", "talker", "talker_generation", "loader", "speech", "long_context")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
HEADING = "## Results\n"


def machine() -> str:
    """Description of the machine and the versions that results belong to."""
    cores = len(os.sched_getaffinity(0))
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    return (
        f"{datetime.date.today()}: {_processor()}, {cores} cores, {gigabytes:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, {packages}, {torch.get_num_threads()} threads."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def formatted(value: float) -> str:
    """Value with three significant digits, and as a whole number from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(rows: list[dict]) -> str:
    lines = ["| measurement | value | |", "|---|--:|---|"]
    lines += [f"| {row['name']} | {formatted(row['value'])} | {row['unit']} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"no benchmark {unknown[0]}; choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))
    rows = []
    for name in names or NAMES:
        print(f"{name} …", file=sys.stderr)
        rows += importlib.import_module(f"benchmarks.{name}").run()
    table = Table("measurement", "value", "unit")
    for row in rows:
        table.add_row(row["name"], formatted(row["value"]), row["unit"])
    Console().print(table)
    if not names:  # a partial run would leave a page whose results are of different days
        before, _, _ = PAGE.read_text().partition(HEADING)
        PAGE.write_text(f"{before}{HEADING}\n{machine()}\n\n{markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
