"""The Thinker: the multimodal language model."""

from omni_train.models.thinker.model import Thinker, build_chunks

__all__ = ["Thinker", "build_chunks"]
