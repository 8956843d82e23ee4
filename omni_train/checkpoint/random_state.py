"""State of a rank's random generators in a checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from omni_train import platform
from omni_train.checkpoint.integrity import damaged
from omni_train.checkpoint.state_files import read_state


def random_state() -> dict:
    """States of all random generators of this process, in plain containers."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    kind, words, *rest = np.random.get_state()
    return {
        "ranks": platform.world_size(),
        "python": random.getstate(),
        "numpy": (kind, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(checkpoint: Path) -> None:
    """Restore the random generators of this rank from a checkpoint, where a run of the same layout wrote it.

    Raises:
        DamagedCheckpoint: their states are not there, or cannot be read.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    files = [checkpoint / f"random_{rank:05d}.pt" for rank in (platform.rank(), 0)]
    path = next(filter(Path.exists, files), files[-1])
    state = read_state(path)
    if path != files[0] and state.get("ranks") == platform.world_size():
        raise damaged(checkpoint, f"{files[0].name} is missing")
    tracker = get_cuda_rng_tracker()
    if path != files[0] or set(tracker.get_states()) != set(state["tracker"]):
        return  # written in another layout: the generators keep their fresh seeds
    set_random_state(state)


def set_random_state(state: dict) -> None:
    """Set all random generators of this process to what :func:`random_state` gave of them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
