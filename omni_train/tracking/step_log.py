"""Reader of the files that a run logs its steps to, ``metrics.jsonl`` and ``expert_load.jsonl``, damaged or not."""

from __future__ import annotations

import json
from pathlib import Path

from omni_train.platform.logs import warn


def read_lines(path: Path) -> list[tuple[bytes, dict]]:
    """(line, the step that it holds) of each line of a file, in order; none where there is no file.

    Lines that are no JSON object with a number as ``step``, as a crash may leave one, are left out, and counted in a
    warning.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    steps = [(line, step) for line in lines if (step := _step_of(line)) is not None]
    if broken := len(lines) - len(steps):
        warn(f"{path}: {broken} of its {len(lines)} lines cannot be read and are left out")
    return steps


def _step_of(line: bytes) -> dict | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return values if isinstance(step, int | float) and not isinstance(step, bool) else None
