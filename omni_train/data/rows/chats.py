"""From a sample to token sequences with labels: chats as a template writes them, documents as plain text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from omni_train.data.rows.batch import IGNORE, MODALITIES
from omni_train.data.samples.chat_template import answer_text, generation_prompt, rounds, written
from omni_train.data.samples.clips import Clip, read_clip
from omni_train.data.samples.positions import Kind, rotary_ids
from omni_train.data.samples.rendering import Rendering, rendered_length
from omni_train.data.samples.sample import Chat, Document, Medium, Sample, SampleError, Turn
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import ChatTemplate, DataConfig, LossOn, MediaConfig, ModelConfig

PADS = {Kind.audio: "<|audio_pad|>", Kind.image: "<|image_pad|>", Kind.video: "<|video_pad|>"}
VIDEO_READINGS = 4  # at most, until a video fits; the second nearly always does
TURN_TOKENS = 4  # at least: <|im_start|>, the role and its line end, <|im_end|>, a line end
MEDIUM_TOKENS = 3  # at least: one between two marks
COMPOSED = 4  # characters that become one in Unicode's NFC, which some tokenizers write: a letter and three marks
MOST_ROWS = 64  # of the rounds of one chat together: each of n repeats the ones before it


@dataclass
class TokenSequence:
    """What packing keeps whole: a sample, or one piece of a document that is longer than a row."""

    tokens: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32, shifted: labels[i] is the token that position i predicts, or IGNORE
    begins_sample: bool = True
    positions: np.ndarray | None = None  # (3, n) int64 or float32 rotary ids; None counts from 0 on all three axes
    modality: int = 0  # index into batch.MODALITIES
    mel: list[np.ndarray] = field(default_factory=list)  # (F, M) float32 of each clip
    audio_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # within the sequence
    patches: list[np.ndarray] = field(default_factory=list)  # (P, D) uint8 of each image or video
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # (t, h, w) patches of each image or video
    vision_slots: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def media_bytes(self) -> int:
        """Memory of the decoded media."""
        return sum(array.nbytes for array in (*self.mel, *self.patches))


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
    """The sequences of a sample, each at most ``row_tokens`` long; ``parts`` are the files beside ``key.json``.

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
        """A video, which is read anew for each room, or what is the same in every round."""
        if "max_tokens" in room:
            return read_clip(medium, parts=parts, model=model, media=media, **room)
        if medium not in shown:
            shown[medium] = read_clip(medium, parts=parts, model=model, media=media, **room)
        return shown[medium]

    tokens = 0
    for turns in rounds(sample.turns, template):
        if tokens > MOST_ROWS * row_tokens:
            raise SampleError("too_many_rounds")
        refuse_long(turns, tokenizer, row_tokens)
        text = render(turns, tokenizer, loss_on, template=template)
        if not any(text.learned):
            raise SampleError("no_loss")
        clips = _read_clips(turns, len(text), tokenizer, row_tokens, read)
        whole = render(turns, tokenizer, loss_on, clips, template=template) if clips else text
        sequences.append(_sequence(whole, tokenizer, turns, clips, media))
        sequences[-1].begins_sample = len(sequences) == 1
        tokens += len(sequences[-1])
    if not sequences:
        raise SampleError("no_loss")
    return sequences


def sequences_of(
    sample: Sample, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, parts: Mapping[str, bytes]
) -> list[TokenSequence]:
    """What :func:`tokenize` makes of a sample as a recipe's data are written."""
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
    """What a model is given to generate the last assistant turn, without labels, and the text of that turn.

    The sequence ends in ``<|im_start|>assistant`` and its line end, with an empty block of thinking where the template
    has one, and is at most ``max_tokens`` long. Raises SampleError: ``no_answer`` for a chat without an assistant turn,
    and the reasons of ``tokenize``.
    """
    last = max((index for index, turn in enumerate(chat.turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise SampleError("no_answer")
    turns = chat.turns[:last]
    refuse_many(turns, max_tokens, media)
    refuse_long(turns, tokenizer, max_tokens)
    length = len(render(turns, tokenizer, answer=True, template=template))
    read = functools.partial(read_clip, parts=parts, model=model, media=media)
    clips = _read_clips(turns, length, tokenizer, max_tokens, read)
    rendering = render(turns, tokenizer, clips=clips, answer=True, template=template)
    sequence = _sequence(rendering, tokenizer, turns, clips, media)
    sequence.labels[:] = IGNORE
    return sequence, answer_text(chat.turns[last], template)


def refuse_many(turns: Sequence[Turn], row_tokens: int, media: MediaConfig) -> None:
    """Refuse a chat of more than a row could hold by the number of its turns and media, before any is read.

    Raises SampleError: ``too_long``, or ``too_many_media``.
    """
    number = sum(len(turn.media) for turn in turns)
    if number > media.max_media:
        raise SampleError("too_many_media")
    if TURN_TOKENS * len(turns) + MEDIUM_TOKENS * number > row_tokens:
        raise SampleError("too_long")


def refuse_long(turns: Sequence[Turn], tokenizer: Tokenizer, row_tokens: int) -> None:
    """Refuse a chat whose texts cannot fit in a row, before they are encoded. Raises SampleError ``too_long``."""
    characters = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
    if characters > COMPOSED * tokenizer.longest * row_tokens:
        raise SampleError("too_long")


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    loss_on: LossOn = LossOn.assistant,
    clips: Mapping[Medium, Clip] | None = None,
    answer: bool = False,
    template: ChatTemplate = ChatTemplate.chatml,
) -> Rendering:
    """Turns and those media of theirs that are among ``clips``; with ``answer``, the head of an assistant's turn.

    To be predicted are the texts of learned turns and their ``<|im_end|>``. The ids are those of the chat template,
    except that control tokens spelled in a text stay text.
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


def _read_clips(
    turns: Sequence[Turn],
    length: int,
    tokenizer: Tokenizer,
    max_tokens: int,
    read: Callable[..., Clip],
) -> dict[Medium, Clip]:
    """Read all media of ``turns``, whose text is ``length`` long; videos last, in equal shares of the tokens left."""
    clips: dict[Medium, Clip] = {}
    left = max_tokens - length
    waiting = sorted((medium for turn in turns for medium in turn.media), key=lambda medium: medium.kind == "video")
    for index, medium in enumerate(waiting):
        if left < 0:
            break
        if medium not in clips and medium.kind == "video":
            share = left // (len(waiting) - index)
            clips[medium], length = _read_video(functools.partial(read, medium, sound_tokens=share), share, tokenizer)
        else:
            clips[medium] = clips.get(medium) or read(medium, sound_tokens=left)
            length = rendered_length(clips[medium], tokenizer)
        left -= length
    if left < 0:
        raise SampleError("too_long")
    return clips


def _read_video(read: Callable[..., Clip], share: int, tokenizer: Tokenizer) -> tuple[Clip, int]:
    """The largest reading of a video of at most ``share`` tokens, sound and timestamps included; and their number."""
    room = share
    for _ in range(VIDEO_READINGS):
        if room <= 0:
            break
        clip = read(max_tokens=room)
        length = rendered_length(clip, tokenizer)
        if length <= share:
            return clip, length
        # Nothing was known of its sound and timestamps. Timestamps become fewer with the patches, sound does not.
        room = clip.vision_tokens * (share - clip.audio_tokens) // (length - clip.audio_tokens)
    raise SampleError("too_long")


def _sequence(
    rendering: Rendering, tokenizer: Tokenizer, turns: Sequence[Turn], clips: Mapping[Medium, Clip], media: MediaConfig
) -> TokenSequence:
    shown = [clips[medium] for turn in turns for medium in turn.media]
    if not shown:
        tokens = np.array(rendering.tokens, dtype=np.int32)
        return TokenSequence(tokens, _labels(tokens, np.array(rendering.learned, dtype=bool)))
    positions, kinds = rotary_ids(rendering.runs, media.positions)
    text = kinds == Kind.text
    tokens = np.empty(len(kinds), dtype=np.int32)
    learned = np.zeros(len(kinds), dtype=bool)
    tokens[text] = rendering.tokens
    learned[text] = rendering.learned
    slots = {kind: np.flatnonzero(kinds == kind) for kind in PADS}
    for kind, own in slots.items():
        if len(own):
            tokens[own] = tokenizer.token_id(PADS[kind])
    return TokenSequence(
        tokens,
        _labels(tokens, learned),
        positions=positions,
        modality=max(MODALITIES.index(clip.modality) for clip in shown),
        mel=[clip.mel for clip in shown if clip.mel is not None],
        audio_slots=slots[Kind.audio],
        patches=[clip.patches for clip in shown if clip.patches is not None],
        grids=[clip.grid for clip in shown if clip.grid is not None],
        vision_slots=np.sort(np.concatenate([slots[Kind.image], slots[Kind.video]])),
    )


def _labels(tokens: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Shifted: the next token where that is learned."""
    labels = np.full_like(tokens, IGNORE)
    labels[:-1] = np.where(learned[1:], tokens[1:], IGNORE)
    return labels
