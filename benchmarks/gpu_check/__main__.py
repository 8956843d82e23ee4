"""``python -m benchmarks.gpu_check [PART …] [--out FOLDER] [--seconds N]``: all parts, or those named.

Exits with 1 where a check failed or a part broke, else with 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder of gpu_check.json")
    parser.add_argument("--seconds", type=float, default=440, help="no part begins that is not likely to end by then")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    from omni_train import platform

    if not platform.has_cuda():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    platform.setup()

    from benchmarks.gpu_check import kernels, slice, steps
    from benchmarks.gpu_check.machine import description, machine
    from benchmarks.gpu_check.report import Report

    reference = None

    def whole_steps(report: Report) -> None:
        steps.steps(report, reference)

    # Name, part, seconds that it is likely to take on a GPU.
    parts = {
        "machine": (machine, 10),
        "gated_delta_net": (kernels.gated_delta_net, 40),
        "attention": (kernels.attention, 20),
        "experts": (kernels.experts, 20),
        "norms_and_loss": (kernels.norms_and_loss, 15),
        "steps": (whole_steps, 90),
        "slice": (slice.flash_slice, 150),
    }
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(parts)}")
    chosen = options.parts or list(parts)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu_check.json", description())
    print(report.machine, flush=True)
    if "steps" in chosen:
        reference = steps.Reference()
    try:
        for name in chosen:
            part, seconds = parts[name]
            report.part, start = name, time.monotonic()
            if platform.has_cuda() and start - began + seconds > options.seconds:
                report.left_out("all of it", f"{options.seconds:.0f} s are nearly over; name it to run it alone")
                continue
            try:
                part(report)
            except Exception as error:
                traceback.print_exc()
                report.failed("broke", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                platform.parallel.destroy()  # what it left behind
            report.measure("took", time.monotonic() - start, "s")
    finally:
        if reference is not None:
            reference.stop()
    report.show()
    failures = len(report.failures)
    checks = sum(entry.limit is not None for entry in report.entries)
    left = [f"{entry.part}: {entry.name}" for entry in report.entries if entry.note.startswith("left out")]
    print(f"{checks} checks, {failures} failed; left out: {'; '.join(left) or 'nothing'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
