"""Next-token cross-entropy, with Qwen3.5's multi-token prediction beside it where the model has that layer."""

from __future__ import annotations

import torch

from omni_train.data.rows.batch import MODALITIES
from omni_train.models.row import LocalRow
from omni_train.nn.cross_entropy import chunked_cross_entropy


class LanguageModelling:
    """Sum of weighted cross-entropies over the row's positions, divided by the global batch's weight.

    Dividing by the weight of the *whole* batch, known before the step, makes the sum over rows, ranks and micro-batches
    the mean per token, however they are divided.

    Args:
        chunk_tokens: positions whose logits exist at once.
        mtp_loss_weight: weight of the multi-token-prediction loss.
    """

    def __init__(self, chunk_tokens: int, mtp_loss_weight: float) -> None:
        self.chunk_tokens = chunk_tokens
        self.mtp_loss_weight = mtp_loss_weight
        self.batch_weight = 1.0  # sum of the loss weights of the global batch; set before each step

    def __call__(self, model, hidden: torch.Tensor, row: LocalRow):
        """(loss summed over this rank's part of the row, sums to log), as ``models.thinker.model.Objective`` says.

        ``loss_by_modality`` is the sum over the tokens of each modality, not divided by anything.
        """
        loss, losses = self._cross_entropy(model, hidden, row.labels, row.loss_weights)
        by_modality = losses.new_zeros(len(MODALITIES)).index_add_(0, row.modality.long(), losses * row.loss_weights)
        sums = {"loss": loss.detach(), "loss_by_modality": by_modality}
        if model.mtp_process:
            predicted = model.mtp(row.next_embedding, hidden, model.rotary(row.position_ids), row)
            mtp_loss, _ = self._cross_entropy(model, predicted, row.next_labels, row.next_loss_weights)
            sums["mtp_loss"] = mtp_loss.detach()
            loss = loss + self.mtp_loss_weight * mtp_loss
        return loss, sums

    def _cross_entropy(self, model, hidden, labels, weights) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum, and the loss of every position in nats."""
        return chunked_cross_entropy(
            hidden[:, 0],
            model.head_weight(),
            labels,
            weights / self.batch_weight,
            chunk_tokens=self.chunk_tokens,
            tp_group=model.tp_group,
            sequence_parallel=model.config.sequence_parallel,
        )
