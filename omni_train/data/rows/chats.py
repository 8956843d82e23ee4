"""From a sample to token sequences with labels: chats as a template writes them, documents as plain text."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from omni_train.data.rows.batch import IGNORE, MODALITIES
from omni_train.data.rows.room import read_clips, refuse_long, refuse_many
from omni_train.data.rows.sequences import TokenSequence, shifted
from omni_train.data.samples.chat_template import answer_text, generation_prompt, rounds, written
from omni_train.data.samples.clips import Clip, read_clip
from omni_train.data.samples.positions import rotary_ids
from omni_train.data.samples.rendering import Rendering
from omni_train.data.samples.sample import Chat, Document, Medium, Sample, SampleError, Turn
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import ChatTemplate, DataConfig, LossOn, MediaConfig, ModelConfig

MOST_ROWS = 64  # of the rounds of one chat together: each of n repeats the ones before it


def tokenize(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    loss_on: LossOn,
    media: MediaConfig,
    model: ModelConfig,
    parts: Mapping[str, bytes],
    template: ChatTemplate = ChatTemplate.chatml,
) -> list[TokenSequence]:
    """Token sequences of a sample, each at most ``row_tokens`` long; ``parts`` are the files beside ``key.json``.

    A long document is cut into pieces of a whole row and a rest; positions start anew in each piece, and the label at
    the end of a piece is the first token of the next. A chat is one sequence, or one for each of its ``rounds``. Videos
    of a chat share the room that the rest of it leaves. Raises SampleError: ``too_long`` for a chat that does not fit
    in a row, ``no_loss`` for one without anything to learn, ``too_many_rounds`` for one whose rounds are ``MOST_ROWS``
    rows and more, and the reasons of ``refuse_many``, ``read_clip`` and ``written``.
    """
    if isinstance(sample, Document):
        tokens = np.array([*tokenizer.encode(sample.text), tokenizer.end_of_text], dtype=np.int32)
        labels = np.append(tokens[1:], np.int32(IGNORE))
        return [
            TokenSequence(tokens[start : start + row_tokens], labels[start : start + row_tokens], start == 0)
            for start in range(0, len(tokens) - 1, row_tokens)  # the last token predicts nothing: no piece begins at it
        ]
    refuse_many(sample.turns, row_tokens, media)
    sequences: list[TokenSequence] = []
    shown: dict[Medium, Clip] = {}

    def read(medium: Medium, **room: int) -> Clip:
        """Clip of a medium: a video is read anew for each number of tokens it may take, others once for all rounds."""
        if "max_tokens" in room:
            return read_clip(medium, parts=parts, model=model, media=media, **room)
        if medium not in shown:
            shown[medium] = read_clip(medium, parts=parts, model=model, media=media, **room)
        return shown[medium]

    total = 0
    for turns in rounds(sample.turns, template):
        if total > MOST_ROWS * row_tokens:
            raise SampleError("too_many_rounds")
        refuse_long(turns, tokenizer, row_tokens)
        text = render(turns, tokenizer, loss_on, template=template)
        if not any(text.learned):
            raise SampleError("no_loss")
        clips = read_clips(turns, len(text), tokenizer, row_tokens, read)
        whole = render(turns, tokenizer, loss_on, clips, template=template) if clips else text
        sequences.append(as_sequence(whole, tokenizer, turns, clips, media))
        sequences[-1].begins_sample = len(sequences) == 1
        total += len(sequences[-1])
    if not sequences:
        raise SampleError("no_loss")
    return sequences


def sequences_of(
    sample: Sample, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, parts: Mapping[str, bytes]
) -> list[TokenSequence]:
    """Token sequences of a sample, by :func:`tokenize` with the settings of a recipe."""
    return tokenize(
        sample,
        tokenizer,
        row_tokens=data.row_tokens,
        loss_on=data.loss_on,
        media=data.media,
        model=model,
        parts=parts,
        template=data.chat_template,
    )


def prompt(
    chat: Chat,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    media: MediaConfig,
    model: ModelConfig,
    parts: Mapping[str, bytes],
    template: ChatTemplate = ChatTemplate.chatml,
) -> tuple[TokenSequence, str]:
    """Prompt from which a model generates the last assistant turn, without labels, and the text of that turn.

    The sequence ends in ``<|im_start|>assistant`` and its line end, with an empty block of thinking where the template
    has one, and is at most ``max_tokens`` long. Raises SampleError: ``no_answer`` for a chat without an assistant turn,
    and the reasons of ``tokenize``.
    """
    last = max((index for index, turn in enumerate(chat.turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise SampleError("no_answer")
    turns = chat.turns[:last]
    rendering, clips = rendered(turns, tokenizer, max_tokens, media, model, parts, template, answer=True)
    sequence = as_sequence(rendering, tokenizer, turns, clips, media)
    sequence.labels[:] = IGNORE
    return sequence, answer_text(chat.turns[last], template)


def rendered(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    max_tokens: int,
    media: MediaConfig,
    model: ModelConfig,
    parts: Mapping[str, bytes],
    template: ChatTemplate,
    *,
    answer: bool = False,
) -> tuple[Rendering, dict[Medium, Clip]]:
    """Rendering of turns with all their media, at most ``max_tokens`` long, and the clips of these media.

    With ``answer``, an assistant's head follows. Raises SampleError: the reasons of ``tokenize``.
    """
    refuse_many(turns, max_tokens, media)
    refuse_long(turns, tokenizer, max_tokens)
    length = len(render(turns, tokenizer, answer=answer, template=template))
    read = functools.partial(read_clip, parts=parts, model=model, media=media)
    clips = read_clips(turns, length, tokenizer, max_tokens, read)
    return render(turns, tokenizer, clips=clips, answer=answer, template=template), clips


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    loss_on: LossOn = LossOn.assistant,
    clips: Mapping[Medium, Clip] | None = None,
    answer: bool = False,
    template: ChatTemplate = ChatTemplate.chatml,
) -> Rendering:
    """Rendering of turns with those of their media that are in ``clips``; with ``answer``, an assistant's head follows.

    Labels are the texts of learned turns and their ``<|im_end|>``. The ids are those of the chat template, except that
    control tokens spelled in a text stay text.
    """
    rendering = Rendering(tokenizer)
    for before, turn, answers in written(turns, template):
        learned = answers or loss_on == LossOn.all
        rendering.control(tokenizer.im_start)
        rendering.text(f"{turn.role}\n{before}")
        for part in turn.parts:
            if isinstance(part, str):
                rendering.text(part, learned=learned)
            elif clips and part in clips:
                rendering.clip(clips[part])
        rendering.control(tokenizer.im_end, learned=learned)
        rendering.text("\n")
    if answer:
        rendering.control(tokenizer.im_start)
        rendering.text(f"assistant\n{generation_prompt(template)}")
    rendering.close()
    return rendering


def as_sequence(
    rendering: Rendering, tokenizer: Tokenizer, turns: Sequence[Turn], clips: Mapping[Medium, Clip], media: MediaConfig
) -> TokenSequence:
    """Token sequence of a rendering of turns with all their media, which are in ``clips``."""
    shown = [clips[medium] for turn in turns for medium in turn.media]
    if not shown:
        tokens = np.array(rendering.tokens, dtype=np.int32)
        return TokenSequence(tokens, shifted(tokens, np.array(rendering.learned, dtype=bool)))
    positions, kinds, pads = rotary_ids(rendering.runs, media.positions)
    text = kinds == 0
    tokens = np.empty(len(kinds), dtype=np.int32)
    learned = np.zeros(len(kinds), dtype=bool)
    tokens[text] = rendering.tokens
    learned[text] = rendering.learned
    slots: dict[str, list[np.ndarray]] = {"audio": [], "vision": []}
    for kind, pad in enumerate(pads, 1):
        if len(own := np.flatnonzero(kinds == kind)):
            tokens[own] = tokenizer.token_id(pad.token)
            slots[pad.encoder].append(own)
    return TokenSequence(
        tokens,
        shifted(tokens, learned),
        positions=positions,
        modality=max(MODALITIES.index(clip.modality) for clip in shown),
        mel=[clip.mel for clip in shown if clip.mel is not None],
        audio_slots=_in_order(slots["audio"]),
        patches=[clip.patches for clip in shown if clip.patches is not None],
        grids=[clip.grid for clip in shown if clip.grid is not None],
        vision_slots=_in_order(slots["vision"]),
    )


def _in_order(slots: list[np.ndarray]) -> np.ndarray:
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *slots]))
