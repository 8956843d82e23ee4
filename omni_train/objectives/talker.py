"""Objective of the Talker: codebook 0 with the control codes, and the residual codes of some frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.schedules import drawable
from omni_train.models.talker.codec_head import masked_cross_entropy
from omni_train.models.talker.row import LocalSpeechRow
from omni_train.objectives.base import Forward, GlobalBatch, Objective, Outcome
from omni_train.recipe.schema import Recipe, States, required


class Reads(Protocol):
    """The frozen Thinker, as the objective asks it."""

    def states(self, engine: Forward, rows: Sequence[Any]) -> list[torch.Tensor]:
        """States of each row's `context`, (K, H), the same on every rank of a model group. Collective."""
        ...


class TalkerObjective(Objective):
    """Objective of the Talker: cross-entropy of what each position predicts of codebook 0 and the control codes, mean
    over the global batch, and `residual_weight` times that of the residual codes, each frame's mean over its codes.

    The code predictor learns on a random fraction of the frames in training, which count as many times as much, so that
    the loss is unbiased; held-out rows are measured on all. Both parts are divided by the labels of codebook 0.

    Metrics in nats: ``loss``; ``loss_code0`` for each label of codebook 0; ``loss_residual`` for each residual code.

    Args:
        recipe: of network=talker.
        thinker: the Thinker below, where it runs.
    """

    def __init__(self, recipe: Recipe, thinker: Reads | None) -> None:
        self.training, self.thinker = recipe.talker_training, thinker
        self.talker, self.chunk_tokens = required(recipe.model.talker), recipe.loss_chunk_tokens
        self.live = recipe.data.speech.states is States.live
        # Experts of several data ranks work together, and interleaved stages take their rows in equal numbers.
        self.all_rows = recipe.parallel.expert > 1 or recipe.parallel.virtual_pipeline > 1
        switch = recipe.data.speech.switch_label
        self.drawable = {
            ended: torch.from_numpy(drawable(self.talker, switch, text_ended=ended)) for ended in (False, True)
        }

    def weight(self, row: SpeechRow) -> float:
        """Weight of a row: its labels of codebook 0."""
        return float((row.speech_labels != IGNORE).sum())

    def tokens(self, row: SpeechRow) -> float:
        """Positions of a row without padding."""
        return float((~row.speech_padding).sum())

    def prepare(self, engine: Forward, rows: list) -> list:
        """See :class:`Objective`: the Thinker's states of the rows that read some."""
        for row in rows:
            row.prepared = {}
        if self.live:
            assert self.thinker is not None  # as validation has seen
            reading = [row for row in rows if len(row.context) or self.all_rows]
            found = self.thinker.states(engine, reading) if reading else []
            for row, states in zip(reading, found, strict=True):
                row.prepared = {"states": states}
        return rows

    def __call__(self, model: Any, hidden: torch.Tensor, row: LocalSpeechRow, batch: GlobalBatch) -> Outcome:
        """Losses and metrics of this rank's positions of a row; see :class:`Objective`.

        Args:
            model: the last pipeline stage of the Talker.
            hidden: (S, 1, H) hidden states after the final norm.
            row: this rank's part of the row.
            batch: the global batch that the row is of.
        """
        hidden_SH, labels_S = hidden[:, 0], row.labels
        first, first_S = self._first(model, hidden_SH, labels_S, row.text_ended, batch)
        fraction = self.training.predictor_fraction if batch.training else 1.0
        learned_S = row.label_codes[:, 0] != IGNORE
        if fraction < 1:
            learned_S = learned_S & (row.draws < fraction)
        here = learned_S.nonzero().squeeze(1)
        residual_FG = model.code_predictor.losses(
            hidden_SH[here],
            model.codec_embedding(labels_S[here]),
            row.label_codes[here],
            chunk_tokens=self.chunk_tokens,
        )
        residual = residual_FG.mean(1).sum() if len(here) else residual_FG.sum()
        loss = first + residual * (self.training.residual_weight / (fraction * batch.weight))
        sums = torch.stack(
            [
                loss.detach().double(),
                first_S.sum().double(),
                (labels_S != IGNORE).sum().double(),
                residual_FG.detach().sum().double(),
                torch.tensor(float(residual_FG.numel()), dtype=torch.float64, device=hidden.device),
            ]
        )
        if model.config.sequence_parallel:  # each tensor-parallel rank has positions of its own
            torch.distributed.all_reduce(sums, group=model.tp_group)
        total, of_first, labels, of_residual, codes = sums
        metrics = {
            "loss": (total, None),
            "loss_code0": (of_first, labels),
            "loss_residual": (of_residual, codes),
        }
        return Outcome(losses={"model": loss}, metrics=metrics)

    def _first(
        self, model: Any, hidden_SH: torch.Tensor, labels_S: torch.Tensor, ended_S: torch.Tensor, batch: GlobalBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of codebook 0 and the control codes: its part of the loss, and that of each position.

        What may be drawn is another before the end of the text and after it.
        """
        loss, losses_S = hidden_SH.new_zeros((), dtype=torch.float32), torch.zeros_like(labels_S, dtype=torch.float32)
        for ended, drawable_V in self.drawable.items():
            part, part_S = masked_cross_entropy(
                hidden_SH,
                model.codec_head.weight,
                torch.where(ended_S == ended, labels_S, IGNORE),
                (labels_S != IGNORE).float() / batch.weight,
                drawable_V.to(hidden_SH.device),
                chunk_tokens=self.chunk_tokens,
            )
            loss, losses_S = loss + part, losses_S + part_S
        return loss, losses_S
