"""Table of the kinds of rows, the values of ``data.rows``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from omni_train import plugins
from omni_train.data.rows.base import Reading, RowKind
from omni_train.data.rows.batch import PackedBatch, SpeechRow, WaveRow
from omni_train.data.rows.chats import prompt, sequences_of
from omni_train.data.rows.crops import Crop, pack_crops, read_crop
from omni_train.data.rows.packing import packer
from omni_train.data.rows.questions import Question, held_out_questions
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import SpeechSequence, speech_sequence
from omni_train.data.rows.speech_checks import check_speech, check_speech_tokens
from omni_train.data.rows.speech_packing import speech_packer
from omni_train.data.rows.spoken_prompts import SpokenPrompt, held_out_prompts
from omni_train.data.rows.transcripts import transcript_prompt, transcript_sequence
from omni_train.data.rows.utterances import Utterance, held_out_utterances
from omni_train.data.samples.augmentation import Augmentation
from omni_train.data.samples.chat_template import check_template
from omni_train.data.samples.sample import Sample
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, EvaluationConfig, ModelConfig, Recipe, States


class Sequences(RowKind):
    """Rows of token sequences."""

    row = PackedBatch

    def row_maker(self, tokenizer: Tokenizer, data: DataConfig) -> Callable[[list[TokenSequence]], PackedBatch]:
        return packer(data, tokenizer.end_of_text)


class Chats(Sequences):
    """Rows of documents and conversations with media, for the Thinker."""

    name = "chats"

    def read(self, sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> list[TokenSequence]:
        return sequences_of(sample, reading.tokenizer, reading.data, reading.model, parts)

    def held_out(
        self, data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any
    ) -> list[Question]:
        ask = functools.partial(prompt, template=data.chat_template)
        return held_out_questions(ask, data, model, evaluation, **share)

    def warning(self, data: DataConfig) -> str | None:
        return check_template(data.tokenizer, data.chat_template)


class Transcripts(Sequences):
    """Rows of clips with their transcripts, for the recognizer."""

    name, augmented = "transcripts", True

    def read(self, sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> list[TokenSequence]:
        data, augmentation = reading.data, None
        if reading.seed is not None and data.augmentation is not None:
            augmentation = Augmentation(data.augmentation, reading.seed, reading.key)
        sequence = transcript_sequence(
            sample,
            reading.tokenizer,
            row_tokens=data.row_tokens,
            media=data.media,
            model=reading.model,
            parts=parts,
            augmentation=augmentation,
        )
        return [sequence]

    def held_out(
        self, data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any
    ) -> list[Question]:
        return held_out_questions(transcript_prompt, data, model, evaluation, **share)


class Crops(RowKind):
    """Rows of waveforms of one length, for the codec."""

    name, row = "crops", WaveRow

    def read(self, sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> list[Crop]:
        return [read_crop(sample, parts, reading.data, reading.model, draw=reading.draw)]

    def row_maker(self, tokenizer: Tokenizer, data: DataConfig) -> Callable[[list[Crop]], WaveRow]:
        return pack_crops

    def held_out(
        self, data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any
    ) -> list[Utterance]:
        return held_out_utterances(data, model, evaluation, **share)


class Speech(RowKind):
    """Rows of spoken texts and answers, for the Talker."""

    name, row = "speech", SpeechRow

    def read(self, sample: Sample, parts: Mapping[str, bytes], reading: Reading) -> list[SpeechSequence]:
        return [speech_sequence(sample, parts, reading)]

    def row_maker(self, tokenizer: Tokenizer, data: DataConfig) -> Callable[[list[SpeechSequence]], SpeechRow]:
        return speech_packer(data, tokenizer.end_of_text)

    def bounds(self, data: DataConfig) -> tuple[int, ...]:
        return (data.speech.row_tokens, *([data.row_tokens] if data.speech.states is States.live else []))

    def lengths(self, piece: SpeechSequence, data: DataConfig) -> tuple[int, ...]:
        thinker = 0 if piece.thinker is None else len(piece.thinker)
        return (len(piece), *([thinker] if data.speech.states is States.live else []))

    def held_out(
        self, data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any
    ) -> list[SpokenPrompt]:
        return held_out_prompts(data, model, evaluation, **share)

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        check_speech(recipe)

    def warning(self, data: DataConfig) -> str | None:
        check_speech_tokens(data)
        return None if data.speech.states is States.none else check_template(data.tokenizer, data.chat_template)


_KINDS: dict[str, RowKind] = {kind.name: kind for kind in (Chats(), Transcripts(), Crops(), Speech())}


def register(kind: RowKind) -> None:
    """Add a kind of rows. The module that does so must be named in OMNI_TRAIN_PLUGINS, for other processes read too.

    Raises:
        ValueError: there is another of that name.
    """
    if kind.name in _KINDS:
        raise ValueError(f"data.rows={kind.name} is registered already")
    _KINDS[kind.name] = kind


def kind_of(name: str) -> RowKind:
    """Kind of rows that ``data.rows`` names.

    Raises:
        UserError: there is none of that name, or a module of OMNI_TRAIN_PLUGINS cannot be imported.
    """
    plugins.load()
    if name not in _KINDS:
        raise UserError(f"data.rows={name}: no such kind of row; choose one of {', '.join(_KINDS)}")
    return _KINDS[name]


def check_rows(recipe: Recipe) -> None:
    """Refuse a recipe whose kind of row does not exist, or refuses it.

    Raises:
        UserError: as ``kind_of`` and ``RowKind.check``.
    """
    kind_of(recipe.data.rows).check(recipe)


def held_out(data: DataConfig, model: ModelConfig, evaluation: EvaluationConfig, **share: Any) -> list:
    """This rank's share of the held-out data, by the kind of rows of ``data``: see ``RowKind.held_out``."""
    return kind_of(data.rows).held_out(data, model, evaluation, **share)
