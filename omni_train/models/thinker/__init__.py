"""The Thinker."""

from omni_train.models.thinker.model import Thinker, build_chunks

__all__ = ["Thinker", "build_chunks"]
