"""Filters for messages that libraries write on every run, about packages not needed here and about themselves.

Every entry is one message that was seen and found to be no news to the user; nothing else is dropped. Where Transformer
Engine is missing and matters, `omni_train.nn.backend` warns.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS: dict[type[Warning], tuple[str, ...]] = {
    UserWarning: (
        r"Transformer Engine and Apex are not installed\. Falling back to",
        r"Apex is not installed\. Falling back to Torch Norm",
        r"absl\.logging is not installed\.",
        r"Only transformer-engine>=1\.7\.0 supports MoE experts, but your version is 0\.0\.0\.",
        r"full scope is deprecated\. Use empty cuda_graph_modules",  # of its own default
        r"MimoModelConfig is experimental",  # imported with its optimizer, not used
        r"Using a non-tuple sequence for multidimensional indexing",  # of its own context-parallel slices
        r"The argument order of load has been changed",  # its call, not ours
        r"torch\.distributed is disabled, unavailable or uninitialized",  # its reader asks for that
    ),
    FutureWarning: (r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",),
}

_LOG_MESSAGES: dict[str, str] = {
    # A CUDA toolkit without a device is normal where this runs on CPU.
    "torch.utils.cpp_extension": "No CUDA runtime is found, using CUDA_HOME",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # A checkpoint is written in a directory that we made, and is renamed once it is complete.
    "megatron.core.dist_checkpointing.serialization": "Overwriting old incomplete / corrupted checkpoint...",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def quiet() -> None:
    """Filter these messages in this process. Must run before the first import of Megatron. Idempotent."""
    for category, patterns in _WARNINGS.items():
        for pattern in patterns:
            warnings.filterwarnings("ignore", message=pattern, category=category)
    # Its optimizer asks every shard of a parameter for a gradient; the CPU emulation is where the question passes.
    warnings.filterwarnings(
        "ignore",
        message=r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        module=r"megatron\.core\.optimizer|omni_train\.platform\.cpu",
    )
    for name in _LOG_MESSAGES:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOG_MESSAGES[record.name])
