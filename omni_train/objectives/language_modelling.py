"""Next-token cross-entropy, with Qwen3.5's multi-token prediction beside it where the model has that layer."""

from __future__ import annotations

from typing import Any

import torch

from omni_train.data.rows.batch import MODALITIES, PackedBatch
from omni_train.models.row import LocalRow
from omni_train.nn.cross_entropy import chunked_cross_entropy
from omni_train.objectives.base import GlobalBatch, Objective, Outcome


class LanguageModelling(Objective):
    """Objective of the Thinker: weighted cross-entropy of the next token, mean over the global batch.

    Metrics: ``loss`` and, of the multi-token-prediction layer, ``mtp_loss``, both per token in nats; with
    `by_modality` also ``loss_text``, ``loss_audio`` and so on, of the tokens of each modality in the batch.

    Args:
        chunk_tokens: positions whose logits exist at once.
        mtp_loss_weight: weight of the multi-token-prediction loss.
        by_modality: whether rows have other modalities than text.
    """

    def __init__(self, chunk_tokens: int, mtp_loss_weight: float, by_modality: bool) -> None:
        self.chunk_tokens, self.mtp_loss_weight, self.by_modality = chunk_tokens, mtp_loss_weight, by_modality

    def weight(self, row: PackedBatch) -> float:
        """Weight of a row: the sum of the loss weights of its tokens."""
        return float(row.loss_weights.sum(dtype=torch.float64))

    def __call__(self, model: Any, hidden: torch.Tensor, row: LocalRow, batch: GlobalBatch) -> Outcome:
        """Losses and metrics of this rank's part of a row; see :class:`Objective`.

        Args:
            model: the last pipeline stage of the Thinker.
            hidden: (S, 1, H) hidden states after the final norm.
            row: this rank's part of the row.
            batch: the global batch that the row is of.
        """
        loss, losses = self._cross_entropy(model, hidden, row.labels, row.loss_weights / batch.weight)
        outcome = Outcome(metrics={"loss": (loss.detach(), None)})
        if model.mtp_process:
            predicted = model.mtp(row.next_embedding, hidden, model.rotary(row.position_ids), row)
            mtp_loss, _ = self._cross_entropy(model, predicted, row.next_labels, row.next_loss_weights / batch.weight)
            outcome.metrics["mtp_loss"] = (mtp_loss.detach(), None)
            loss = loss + self.mtp_loss_weight * mtp_loss
        if self.by_modality:
            modality = row.modality.long()
            sums, weights = losses.new_zeros(len(MODALITIES)), losses.new_zeros(len(MODALITIES), dtype=torch.float64)
            sums.index_add_(0, modality, losses * row.loss_weights)
            weights.index_add_(0, modality, row.loss_weights.double())
            pairs = zip(MODALITIES, sums, weights, strict=True)
            outcome.metrics |= {f"loss_{name}": (total, weight) for name, total, weight in pairs}
        outcome.losses["model"] = loss
        return outcome

    def _cross_entropy(
        self, model: Any, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy in nats: the weighted sum over the positions, and that of each position."""
        return chunked_cross_entropy(
            hidden[:, 0],
            model.head_weight(),
            labels,
            weights,
            chunk_tokens=self.chunk_tokens,
            tp_group=model.tp_group,
            sequence_parallel=model.config.sequence_parallel,
        )
