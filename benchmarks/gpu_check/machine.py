"""Description of the machine: versions, and the two rates that all other results are compared with."""

from __future__ import annotations

import os
import platform as python_platform
import statistics
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_check.report import Report
from omni_train import platform

PACKAGES = ("torch", "triton", "megatron-core", "fla-core", "transformer-engine", "deepspeed")


def description() -> dict:
    """Versions of packages, and devices."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"python": python_platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    if platform.has_cuda():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found


def seconds_of(function, repeats: int = 9) -> float:
    """Median time of a call on the GPU, by the device's own clock, after two to warm up."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def machine(report: Report) -> None:
    """Measure the best rates of matrix products and copies."""
    if not platform.has_cuda():
        report.left_out("peak of products and of copies", "needs a GPU")
        return
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    report.measure("bf16 product of 8192³", 2 * size**3 / seconds_of(lambda: a @ b) / 1e12, "TFLOP/s")
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    report.measure("copy, read and written", 2 * 4 * 2**30 / seconds_of(lambda: target.copy_(source)) / 1e12, "TB/s")
