"""Log lines of the run: from rank 0 only, on standard error, as `omni_train.lines` writes them."""

from __future__ import annotations

from omni_train import lines
from omni_train.platform.device import rank


def say(message: str) -> None:
    """Log a line, once for the whole run."""
    if rank() == 0:
        lines.write(message)


def warn(message: str) -> None:
    """Log a warning, once for the whole run."""
    say(f"WARNING: {message}")
