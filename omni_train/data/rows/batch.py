"""Rows of the package: the types that data code gives to model code.

Axis letters: T tokens of the row, N sequences, F mel frames, M mel bins, P patches, D values of a patch; U positions of
the Talker's row, Q codebooks, K states that the Talker reads, H width of the Thinker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from omni_train.data.rows.base import Row
from omni_train.data.samples.kinds import MODALITIES

IGNORE = -100
"""Label of a position that carries no loss."""


@dataclass
class PackedBatch(Row):
    """Row of T tokens that holds N whole sequences, one after the other.

    Each sequence is padded at its end to a multiple of the recipe's ``data.alignment``; what is left of the row is one
    last sequence of padding. Labels are shifted here and nowhere else: ``labels[t]`` is the token that position t
    predicts. A sequence is a whole sample, or one piece of a document longer than T.
    """

    tokens: torch.Tensor  # (T,) int64
    labels: torch.Tensor  # (T,) int64, IGNORE where there is no loss
    loss_weights: torch.Tensor  # (T,) float32, 0 where there is no loss
    position_ids: torch.Tensor  # (3, T) int64, or float32 (qwen3_omni): T, H, W rotary ids, from 0 in each sequence
    cu_seqlens: torch.Tensor  # (N+1,) int32, from 0 to T
    padding: torch.Tensor  # (T,) bool, True where the token is padding
    modality: torch.Tensor | None = None  # (T,) uint8: index into MODALITIES of each token's sample; None: all text
    # All sound of the row, clip after clip, and the token positions that the audio encoder's outputs fill, in order.
    mel: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 128))  # (F, M) float32
    mel_cu_seqlens: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))  # (clips+1,)
    audio_slots: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    # All images and videos of the row. A patch is (channel, frame, y, x); patches are ordered by frame, then in blocks
    # of merge x merge. Pixels stay bytes; the model maps 0…255 to −1…1.
    patches: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))  # (P, D) uint8
    grid_thw: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))  # patches each way
    vision_slots: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    MODALITIES: ClassVar[Sequence[str]] = MODALITIES
    TENSORS = ("tokens", "labels", "loss_weights", "position_ids", "cu_seqlens", "padding", "modality")
    MEDIA: ClassVar[tuple[str, ...]] = ("mel", "mel_cu_seqlens", "audio_slots", "patches", "grid_thw", "vision_slots")

    def __post_init__(self) -> None:
        if self.modality is None:
            self.modality = torch.zeros_like(self.tokens, dtype=torch.uint8)

    @property
    def max_seqlen(self) -> int:
        """Length of the longest sequence, padding included."""
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @property
    def num_loss_tokens(self) -> float:
        """Sum of the row's loss weights."""
        return float(self.loss_weights.sum())

    def tokens_by_modality(self) -> torch.Tensor:
        """See :class:`Row`."""
        assert self.modality is not None  # since __post_init__
        tokens = torch.zeros(len(MODALITIES), dtype=torch.float64)
        return tokens.index_add_(0, self.modality.long(), (~self.padding).double())


@dataclass
class WaveRow(Row):
    """Row of B crops of speech, each of S samples, filled up with zeros where the speech is shorter."""

    waveform: torch.Tensor  # (B, S) float32, of the codec's sampling rate
    lengths: torch.Tensor  # (B,) int64: samples of speech in each, from 1 to S
    draws: torch.Tensor  # (B,) int64: a number drawn for each crop, whatever is random about it in training
    codes: torch.Tensor | None = None  # (B, N, frames) int64: what a codec made of it; zeros after its end


def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Any:
    """Field of a row whose default is a tensor without elements."""
    return field(default_factory=lambda: torch.zeros(*shape, dtype=dtype))


@dataclass
class SpeechRow(PackedBatch):
    """Row of the Talker, of U positions, with the row of the Thinker whose states enter it, in the fields above.

    What enters at a position is the sum of what is there: a token of the text by its embedding (`text_ids`), a state of
    the Thinker (`sources`), a frame, or a control code, by the embeddings of its codes (`codes`). All of it is decided
    where the row is made, so that the model only gathers.

    The Talker's sequences lie one after the other as the Thinker's do, padded alike, the last one perhaps of padding.
    A sample that reads no states has no sequence in the Thinker's row, which may have no tokens at all.
    """

    text_ids: torch.Tensor = empty(0)  # (U,) int64: token of the text tokenizer, −1: none
    sources: torch.Tensor = empty(0)  # (U,) int64: index of a state among the K, −1: none
    codes: torch.Tensor = empty(0, 0)  # (U, Q) int64, −1: none; of a control code there is the first alone
    speech_labels: torch.Tensor = empty(0)  # (U,) int64: code of codebook 0, or control code, IGNORE: no loss
    label_codes: torch.Tensor = empty(0, 0)  # (U, Q−1) int64: residual codes of the predicted frame, or IGNORE
    speech_positions: torch.Tensor = empty(3, 0)  # (3, U) int64 or float32: rotary ids
    speech_cu_seqlens: torch.Tensor = empty(1, dtype=torch.int32)  # (N+1,) int32, from 0 to U
    speech_padding: torch.Tensor = empty(0, dtype=torch.bool)  # (U,) bool
    speech_kinds: torch.Tensor = empty(0, dtype=torch.uint8)  # (U,) uint8: index into KINDS
    draws: torch.Tensor = empty(0, dtype=torch.float32)  # (U,) uniform from [0, 1): which frames the predictor learns
    context: torch.Tensor = empty(0)  # (K,) int64: positions in the Thinker's row whose states are read
    states: torch.Tensor = empty(0, 0, dtype=torch.float32)  # (K, H) of stored states; empty where the Thinker runs
    KINDS = ("text", "context", "speech", "control")
    MODALITIES = KINDS
    MEDIA = (*PackedBatch.MEDIA, "states")

    def tokens_by_modality(self) -> torch.Tensor:
        """See :class:`Row`: positions of the Talker's row."""
        positions = torch.zeros(len(self.KINDS), dtype=torch.float64)
        return positions.index_add_(0, self.speech_kinds.long(), (~self.speech_padding).double())
