"""Clips with their transcripts as token sequences: the rows of the recognizer.

A sequence is the clip's audio tokens, then what the decoder reads:

    <|audio_pad|> x A  <|im_start|>  en \\n  transcript  <|im_end|>

Everything after ``<|im_start|>`` is learned, so the decoder names the language before it writes. The tag is the
language's code, ``unknown`` where the sample names none, in ordinary text, for the control tokens of the family name no
languages; a line end closes it, and there is none in a transcript.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from omni_train.data.rows.batch import IGNORE, MODALITIES
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.samples.augmentation import Augmentation
from omni_train.data.samples.features.mel import log_mel
from omni_train.data.samples.language import UNKNOWN, language_of
from omni_train.data.samples.lengths import audio_tokens, most_seconds
from omni_train.data.samples.media import read_audio
from omni_train.data.samples.positions import AUDIO_PAD
from omni_train.data.samples.sample import Chat, Document, Medium, Sample, SampleError
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import MediaConfig, ModelConfig, required

TAG_END = "\n"


def transcript_sequence(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    media: MediaConfig,
    model: ModelConfig,
    parts: Mapping[str, bytes],
    augmentation: Augmentation | None = None,
) -> TokenSequence:
    """Token sequence of a sample's speech and what is said there, whose white space becomes single spaces.

    That is the speech of a document or of a chat's last answer, with its text; else the first sound of a chat, with the
    last assistant turn.

    Raises SampleError: ``no_audio``; ``no_answer``, also for one without a word; ``no_transcript`` for a sample of
    another task than ``transcribe``; ``unknown_language`` for one whose language is named and not understood;
    ``too_long`` for one that does not fit in a row; ``media_missing``, and the reasons of
    ``omni_train.data.samples.media``.
    """
    medium, transcript = _pair(sample)
    written = [
        *tokenizer.encode(f"{language_of(sample.meta).code}{TAG_END}"),
        *tokenizer.encode(transcript),
        tokenizer.im_end,
    ]
    room = row_tokens - 1 - len(written)
    return _sequence(medium, written, tokenizer, room, media, model, parts, augmentation)


def transcript_prompt(
    chat: Chat,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    media: MediaConfig,
    model: ModelConfig,
    parts: Mapping[str, bytes],
) -> tuple[TokenSequence, str]:
    """Prompt of a recognizer, up to ``<|im_start|>`` and at most ``max_tokens`` long, and the right transcript.

    Raises SampleError as ``transcript_sequence``.
    """
    medium, transcript = _pair(chat)
    return _sequence(medium, [], tokenizer, max_tokens - 1, media, model, parts, None), transcript


def tag_end(tokenizer: Tokenizer) -> int:
    """Token that ends the language tag."""
    return tokenizer.encode(f"{UNKNOWN}{TAG_END}")[-1]


def split_tag(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """(language, transcript) of tokens that a recognizer wrote, without the last ``<|im_end|>``.

    Where no tag was ended all of it is the language: nothing was transcribed.
    """
    tokens, end = list(tokens), tag_end(tokenizer)
    place = tokens.index(end) if end in tokens else len(tokens)
    return tokenizer.decode(tokens[:place]).strip(), tokenizer.decode(tokens[place + 1 :]).strip()


def _pair(sample: Sample) -> tuple[Medium, str]:
    medium = None if sample.speech is None else Medium("audio", sample.speech)
    if isinstance(sample, Document):
        answers = [sample.text]
    else:
        if medium is None and sample.meta.get("task", "transcribe") != "transcribe":
            raise SampleError("no_transcript")
        medium = medium or next((medium for medium in sample.media if medium.kind == "audio"), None)
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
    if medium is None:
        raise SampleError("no_audio")
    if not language_of(sample.meta).understood:
        raise SampleError("unknown_language")
    transcript = " ".join(answers[-1].split()) if answers else ""
    if not transcript:
        raise SampleError("no_answer")
    return medium, transcript


def _sequence(
    medium: Medium,
    written: list[int],
    tokenizer: Tokenizer,
    room: int,
    media: MediaConfig,
    model: ModelConfig,
    parts: Mapping[str, bytes],
    augmentation: Augmentation | None,
) -> TokenSequence:
    """Token sequence of a clip of at most ``room`` tokens, ``<|im_start|>``, and the tokens that the decoder writes."""
    if room < 1:
        raise SampleError("too_long")
    if medium.file not in parts:
        raise SampleError("media_missing")
    encoder = required(model.audio)
    most = most_seconds(room, encoder) * (1 if augmentation is None else augmentation.fastest)
    waveform = read_audio(parts[medium.file], media, medium.start, medium.end, most=most)
    mel_FM = log_mel(augmentation.waveform(waveform) if augmentation else waveform, encoder.num_mel_bins)
    audio = audio_tokens(len(mel_FM), encoder)
    if audio > room:
        raise SampleError("too_long")
    tokens = [tokenizer.token_id(AUDIO_PAD.token)] * audio + [tokenizer.im_start, *written]
    labels = np.full(len(tokens), IGNORE, dtype=np.int32)
    labels[audio : audio + len(written)] = written
    return TokenSequence(
        np.array(tokens, dtype=np.int32),
        labels,
        modality=MODALITIES.index("audio"),
        mel=[augmentation.mel(mel_FM) if augmentation else mel_FM],
        audio_slots=np.arange(audio),
    )
