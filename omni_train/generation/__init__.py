"""``omni-train generate``: what a Thinker writes and its Talker speaks, from the checkpoints of runs."""
