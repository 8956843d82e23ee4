"""Train Thinker-Talker omni-modal models end to end on Megatron-style parallelism."""

__version__ = "0.1.0"
