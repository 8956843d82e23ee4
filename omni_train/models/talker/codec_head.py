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
    """Weighted sum of the cross-entropy among the codes that may be drawn, as if the others had logits of −∞.

    The head is whole on every rank. Where positions differ in what may be drawn, call once for each set of codes, with
    the labels of the other positions ignored.

    Args:
        hidden_SH: states.
        weight_VH: the head; rows of codes that may not be drawn get a gradient of zeros.
        labels_S: int64, codes that may be drawn, or IGNORE.
        weights_S: weight of each position.
        drawable_V: bool.
        chunk_tokens: positions whose logits exist at once.

    Returns:
        The sum (scalar float32), which can be differentiated once, and the loss of every position in nats, (S,)
        float32, detached, 0 where ignored.

    Raises:
        ValueError: a label may not be drawn.
    """
    ids = drawable_V.nonzero().squeeze(1)
    places_V = torch.full_like(drawable_V, -1, dtype=torch.int64)
    places_V[ids] = torch.arange(len(ids), device=ids.device)
    learned_S = labels_S != IGNORE
    places_S = places_V[labels_S.where(learned_S, 0)]
    if (never_S := learned_S & (places_S < 0)).any():
        raise ValueError(f"labels {labels_S[never_S].unique().tolist()} are codes that may not be drawn")
    return chunked_cross_entropy(
        hidden_SH, weight_VH[ids], places_S.where(learned_S, IGNORE), weights_S, chunk_tokens=chunk_tokens
    )
