"""Loss over the codes that may be drawn, which are those of :func:`omni_train.data.rows.schedules.drawable`.

Axis letters: S positions, H hidden, V codec vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_train.data.rows.batch import IGNORE
from omni_train.nn.cross_entropy import chunked_cross_entropy


def masked_cross_entropy(
    hidden_SH: Tensor, weight_VH: Tensor, labels_S: Tensor, weights_S: Tensor, drawable_V: Tensor, *, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy over the codes that may be drawn, and that of each position in nats.

    Args:
        hidden_SH: states.
        weight_VH: the head.
        labels_S: codes that may be drawn, or IGNORE.
        weights_S: weight of each position.
        drawable_V: bool.
        chunk_tokens: positions whose logits exist at once.
    """
    ids = drawable_V.nonzero().squeeze(1)
    places = torch.full_like(drawable_V, IGNORE, dtype=torch.int64)
    places[ids] = torch.arange(len(ids), device=ids.device)
    labels = torch.where(labels_S == IGNORE, IGNORE, places[labels_S.clamp(min=0)])
    return chunked_cross_entropy(hidden_SH, weight_VH[ids], labels, weights_S, chunk_tokens=chunk_tokens)
