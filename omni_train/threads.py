"""How a process's threads wait for each other. Imports nothing, so that it can run before torch does."""

from __future__ import annotations

import os


def keep_awake() -> None:
    """Let OpenMP's threads spin for the pauses between small operations instead of falling asleep.

    GNU's runtime stops spinning once a process has started more threads than there are cores, which gloo's copies do
    in every distributed process; waking them then costs more than the many small products of Gated DeltaNet. The wait
    is bounded to the length it has in an undisturbed process. What the user has set wins. Before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.update(OMP_WAIT_POLICY="ACTIVE", GOMP_SPINCOUNT="300000")
