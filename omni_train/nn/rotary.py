"""Interleaved TM-RoPE: rotary embedding by three ids per token, of time, height and width (Qwen3.5-Omni).

Axis letters: T tokens, R rotary dimensions (the first of each head's), F = R/2 frequencies.

Megatron applies rotary by sequence, building cos and sin anew in every layer. Here every token has explicit ids, so a
rank slices the ids as it slices the tokens, computes cos and sin once per step, and applies them token by token:
nothing depends on where sequences begin or how the row is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class TMRotaryEmbedding:
    """Interleaved TM-RoPE: cosines and sines of a row's tokens from their ids of time, height and width.

    The F frequencies are assigned to the axes in turn, time, height, width, time, …, until height and width have the
    number that `sections` gives them; the rest are time's. With equal ids it is the ordinary rotary embedding.

    Not a ``torch.nn.Module``: converting a model to bf16 would convert the frequencies.

    Args:
        rotary_dim: R.
        base: θ, the base of the frequencies.
        sections: number of frequencies for time, height and width; they sum to R/2.

    Raises:
        ValueError: sections that cannot be interleaved so.
    """

    def __init__(self, rotary_dim: int, base: float, sections: Sequence[int]) -> None:
        frequencies = rotary_dim // 2
        axes = torch.zeros(frequencies, dtype=torch.long, device="cpu")
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
        if list(sections) != axes.bincount(minlength=3).tolist():
            raise ValueError(f"mrope_section {list(sections)} cannot be interleaved over {frequencies} frequencies")
        self._axis_F = axes
        # In this order of operations: at large ids the last bit shows, and checkpoints were trained with it.
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
        self._frequency_F = 1.0 / base**exponents

    def __call__(self, position_ids_3T: torch.Tensor) -> torch.Tensor:
        """Cosines and sines of each token's rotary angles.

        Args:
            position_ids_3T: (3, T) ids, integer or float, of the tokens this rank holds.

        Returns:
            (T, 1, R) fp32, F cosines followed by F sines, for :func:`apply_rotary`.
        """
        device = position_ids_3T.device
        angles_TF = position_ids_3T.float()[self._axis_F.to(device)].T * self._frequency_F.to(device)
        return torch.cat([angles_TF.cos(), angles_TF.sin()], dim=-1).unsqueeze(1)


def apply_rotary(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first R of each head's dimensions, dimension i together with i + R/2.

    Args:
        x: (T, heads, D) queries or keys.
        rotary: (T, 1, R) from :class:`TMRotaryEmbedding`.

    Returns:
        (T, heads, D) in x's type.
    """
    half = rotary.shape[-1] // 2
    cos, sin = rotary.split(half, dim=-1)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([part.to(x.dtype) for part in rotated] + [rest], dim=-1)
