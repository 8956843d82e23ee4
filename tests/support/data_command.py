"""A command that makes data, in no time: a stage of a pipeline runs it in a process of its own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


def write(out: Path, codec: str, fault: str = "", seconds: float = 0.0) -> None:
    """Write what the process is like."""
    time.sleep(seconds)
    if fault == "damaged":
        from omni_train.checkpoint.integrity import damaged

        raise damaged(Path(codec), "model.pt has 3 bytes, not 7")
    if fault == "killed":
        os.kill(os.getpid(), 9)
    if fault == "crashed":
        raise ZeroDivisionError("a defect")
    out.mkdir(exist_ok=True)
    ranked = sorted({"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys())
    with (out / "calls").open("a") as file:
        print(json.dumps([codec, ranked, os.getsid(0) == os.getpid()]), file=file)
