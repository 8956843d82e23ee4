"""Memory and time of the chunked loss. `run()` gives the rows of `docs/performance.md`."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from omni_train.nn.cross_entropy import chunked_cross_entropy

# The peak of a process only ever rises, so each measurement needs a process of its own.
_MEASURE = """
import sys
import torch
from omni_train.nn.cross_entropy import chunked_cross_entropy

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return 1024 * int(line.split()[1])

tokens, words, hidden_size, chunk_tokens = map(int, sys.argv[1:])

def step(tokens, words, hidden_size):
    hidden = torch.randn(tokens, hidden_size).requires_grad_()
    weight = torch.randn(words, hidden_size).requires_grad_()
    labels = torch.randint(words, (tokens,))
    before = status("VmRSS")
    loss, _ = chunked_cross_entropy(hidden, weight, labels, torch.ones(tokens), chunk_tokens=chunk_tokens)
    loss.backward()
    gradients = 4 * (hidden.numel() + weight.numel())
    return status("VmHWM") - before - gradients  # ru_maxrss would begin at the parent's

step(8, 16, 4)  # libraries and thread pools are not the loss's memory
print(step(tokens, words, hidden_size))
"""


def peak_bytes(tokens: int, words: int, hidden_size: int, chunk_tokens: int) -> int:
    """Peak memory of one fp32 forward and backward pass above its inputs and gradients, in a fresh process."""
    arguments = [sys.executable, "-c", _MEASURE, *map(str, (tokens, words, hidden_size, chunk_tokens))]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def _seconds(*losses, repeats: int = 5) -> list[float]:
    """Best seconds of forward and backward passes of each loss; they take turns, so a busy machine slows all alike."""
    times = [[] for _ in losses]
    for _ in range(repeats + 1):
        for loss, own in zip(losses, times, strict=True):
            start = time.perf_counter()
            loss().backward()
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]


def run() -> list[dict]:
    """Rows of name, value and unit."""
    tokens, words, hidden_size, chunk_tokens = 4096, 4096, 256, 1024
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(words, hidden_size, requires_grad=True)
    labels, ones = torch.randint(words, (tokens,)), torch.ones(tokens)
    ours, plain = _seconds(
        lambda: chunked_cross_entropy(hidden, weight, labels, ones, chunk_tokens=chunk_tokens)[0],
        lambda: F.cross_entropy(hidden @ weight.T, labels, reduction="sum"),
    )
    peak = peak_bytes(tokens=16_384, words=248_320, hidden_size=64, chunk_tokens=1024)
    size = f"T={tokens} V={words} H={hidden_size}"
    return [
        {"name": "chunked loss, peak memory, T=16384 V=248320 H=64", "value": peak / 2**30, "unit": "GiB"},
        {"name": f"chunked loss, forward + backward, {size}", "value": ours, "unit": "s"},
        {"name": f"plain cross-entropy, forward + backward, {size}", "value": plain, "unit": "s"},
    ]


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']}: {row['value']:.3f} {row['unit']}")
