"""Lines for the person who watches the run: from rank 0 only, on standard error."""

from __future__ import annotations

import contextlib
import sys

from omni_train.platform.device import rank


def say(message: str) -> None:
    """Print a line once for the whole run."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # standard error may be a file on a full disk
            print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print a warning that cannot be overlooked, once for the whole run."""
    say(f"WARNING: {message}")
