"""The Talker, which speaks what the Thinker writes."""

from omni_train.models.talker.model import Talker, build_chunks

__all__ = ["Talker", "build_chunks"]
