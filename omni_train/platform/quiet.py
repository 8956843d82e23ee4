"""Silence for what Megatron says about optional packages that a run here does not need.

Every entry is one message that was seen, and nothing else is silenced: a new warning should be read before it is added.
Whether Transformer Engine is missing where it matters is for `omni_train.nn.backend` to say, once and loudly.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"Apex is not installed\. Falling back to Torch Norm",
    r"absl\.logging is not installed\.",
    r"Only transformer-engine>=1\.7\.0 supports MoE experts, but your version is 0\.0\.0\.",
)


def _is_news(record: logging.LogRecord) -> bool:
    """A CUDA toolkit without a device is normal where this runs on CPU."""
    return not record.getMessage().startswith("No CUDA runtime is found, using CUDA_HOME")


def quiet() -> None:
    """Drop these messages in this process. Must run before the first import of Megatron; calling again is harmless."""
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)
