"""``omni-train generate``: what a Thinker writes and its Talker speaks, from the checkpoints of runs."""

from omni_train.generation.command import generate

__all__ = ["generate"]
