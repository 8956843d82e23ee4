"""What small random encoders need in tests, ours and those of transformers."""

from __future__ import annotations

import torch

from omni_train.interop.rows import Rows, as_rows

THINKER_HIDDEN = 28


def laid(rows: list[Rows], theirs: dict[str, torch.Tensor], shape) -> torch.Tensor:
    """Our tensor of the given shape."""
    return torch.cat([as_rows(theirs[part.name])[part.start : part.stop] for part in rows]).view(tuple(shape))


def thinker_config(tensor: int = 1, **options):
    """Megatron's configuration of a Thinker that an encoder stands beside."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=THINKER_HIDDEN,
        num_attention_heads=2,
        init_method_std=0.1,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        **options,
    )


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, norms and biases too, so that one mapped wrongly shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()
