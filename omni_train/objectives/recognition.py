"""Objective of the recognizer: the cross-entropy of transcripts, with CTC on the encoder beside it.

The window in which the audio encoder attends is drawn for each step, so that one encoder serves whole files and streams
(Qwen3.5-Omni's technical report, section 2.1). The sum of both losses is that of Watanabe et al. (2017), with weight 1
on the decoder's: CTC brings the encoder's outputs into the order of the words before the decoder's attention does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from omni_train.data.rows.batch import PackedBatch
from omni_train.data.rows.transcripts import tag_end
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.models.audio_encoder import drawn_window
from omni_train.models.recognizer import Utterances
from omni_train.nn.ctc import alignable
from omni_train.objectives.base import GlobalBatch, Metric, NetworksObjective, Outcome
from omni_train.recipe.schema import Recipe, required


class Recognition(NetworksObjective):
    """Objective of AuT pre-training on rows of transcripts.

    Metrics: ``loss``, the decoder's cross-entropy per token in nats; ``accuracy`` of held-out rows, how often the right
    token was the likeliest; with a CTC head ``ctc_loss`` per token of the clips that it aligns, and ``ctc_unaligned``,
    the fraction of the clips that have too few audio tokens for their transcript and add nothing to the loss.

    Args:
        recipe: a validated recipe with network=recognizer.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.seed, self.audio = recipe.seed, required(recipe.model.audio)
        self.ctc_weight = recipe.recognition.ctc_weight
        self.aligns = required(recipe.model.recognizer).ctc
        self.tag_end = tag_end(Tokenizer(recipe.data.tokenizer))

    def weight(self, row: PackedBatch) -> float:
        """Weight of a row: its tokens with a label."""
        return row.num_loss_tokens

    def run(self, networks: Mapping[str, Any], row: PackedBatch, batch: GlobalBatch) -> Outcome:
        """See :class:`NetworksObjective`."""
        utterances = Utterances.from_batch(row)
        transcripts: list[Tensor] = []
        if self.aligns:
            labels = utterances.labels.cpu().split(utterances.lengths)
            transcripts = utterances.transcripts = [self._transcript(of_clip) for of_clip in labels]
        recognized = networks["model"](utterances, self.window_frames(batch))
        count = len(utterances.labels)
        loss = recognized.loss / batch.weight
        metrics: dict[str, Metric] = {"loss": (recognized.loss.detach(), count)}
        if recognized.correct is not None:
            metrics["accuracy"] = (recognized.correct.sum(), count)
        if self.aligns:
            loss = loss + self.ctc_weight * recognized.ctc_losses.sum() / batch.weight
            aligned = alignable(recognized.audio_lengths, transcripts)
            tokens = sum(len(words) for words, good in zip(transcripts, aligned, strict=True) if good)
            metrics["ctc_loss"] = (recognized.ctc_losses.detach().sum(), tokens)
            metrics["ctc_unaligned"] = (aligned.count(False), len(aligned))
        return Outcome({"model": loss}, metrics)

    def window_frames(self, batch: GlobalBatch) -> int:
        """Attention window of the audio encoder in mel frames, 0 for whole clips: drawn by step, fixed if held out."""
        return drawn_window(self.audio, self.seed, batch.step) if batch.training else self.audio.eval_window_frames

    def _transcript(self, labels: Tensor) -> Tensor:
        """Transcript among the labels of a clip: the tokens between the language tag and `<|im_end|>`."""
        return labels[int((labels == self.tag_end).nonzero()[0]) + 1 : -1]
