"""Held-out chats as questions: the prompt that a model is given, and the answer that it should give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from omni_train.data.rows.batch import PackedBatch
from omni_train.data.rows.chats import sequences_of
from omni_train.data.rows.packing import aligned, best_fit, packer
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.samples.sample import Chat, Medium, SampleError, one_sample
from omni_train.data.samples.sources import ShardFolder, first_samples, open_sources
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, EvaluationConfig, LossOn, ModelConfig


@dataclass
class Question:
    """A chat up to its last assistant turn."""

    name: str  # of the source and the number of the sample in it
    prompt: TokenSequence
    answer: str  # that turn
    meta: dict[str, Any]
    text: str  # the turn before it
    media: list[tuple[Medium, bytes]]  # its files, of the questions that are shown


def held_out_questions(
    ask: Callable[..., tuple[TokenSequence, str]],
    data: DataConfig,
    model: ModelConfig,
    evaluation: EvaluationConfig,
    *,
    split: str = "val",
    data_rank: int = 0,
    data_world_size: int = 1,
    refused: Counter[str] | None = None,
) -> list[Question]:
    """This rank's share of the chats among the first ``evaluation.samples`` samples of each source.

    The first of each source come first, so that a few show every source. The same at every call, and all ranks' shares
    together are the same for any number of ranks; what cannot be read is left out.

    Args:
        ask: function that returns a chat's prompt and its answer; called as ``chats.prompt`` is.
        refused: counter of the samples that cannot be read, by reason; over all ranks each sample counts once.

    Raises:
        UserError: no source has a chat with an answer there, or the split is missing.
    """
    tokenizer, refused = Tokenizer(data.tokenizer), Counter() if refused is None else refused
    sources = open_sources(data, split, training=False)
    unread = refused if data_rank == 0 else Counter()  # which every rank finds
    chats = [list(_chats(source, evaluation.samples, unread)) for source in sources]
    if not any(chats):
        raise UserError(
            f"evaluation.every={evaluation.every}: the first {evaluation.samples} samples of the {split} split of each "
            "source hold no chat to answer; set it to 0, or add a source of chats"
        )
    found: list[Question] = []
    for place in range(data_rank, max(map(len, chats)), data_world_size):
        for source, of_source in zip(data.sources, chats, strict=True):
            if place >= len(of_source):
                continue
            index, chat, read = of_source[place]
            try:
                with one_sample():
                    parts = read()
                    given, answer = ask(
                        chat, tokenizer, max_tokens=data.row_tokens, media=data.media, model=model, parts=parts
                    )
            except SampleError as error:
                refused[error.reason] += 1
                continue
            shown = data_rank == 0 and len(found) < evaluation.print_samples
            found.append(
                Question(
                    name=f"{PurePath(source.path).name}/{index}",
                    prompt=given,
                    answer=answer,
                    meta=chat.meta,
                    text=([turn.text for turn, reply in pairwise(chat.turns) if reply.role == "assistant"] or [""])[-1],
                    media=[(medium, parts[medium.file]) for medium in chat.media if shown and medium.file in parts],
                )
            )
    return found


def answer_rows(
    data: DataConfig,
    model: ModelConfig,
    evaluation: EvaluationConfig,
    *,
    swapped: bool,
    split: str = "val",
    data_rank: int = 0,
    data_world_size: int = 1,
) -> list[PackedBatch]:
    """This rank's rows of the chats with media among the first ``evaluation.samples`` samples of each source.

    A model that uses its media has a larger loss with those of another chat; one that guesses from the text has not.

    Args:
        swapped: every chat has the files of another one of its source, of the same kinds and another last answer;
            chats for which there is none are left out of both.

    Returns:
        rows whose loss is on the assistant's turns; as many on every rank, the last ones perhaps of padding alone.
    """
    tokenizer, data = Tokenizer(data.tokenizer), replace(data, loss_on=LossOn.assistant)
    sequences: list[TokenSequence] = []
    for folder in open_sources(data, split, training=False):
        chats = [(chat, read) for _, chat, read in _chats(folder, evaluation.samples, Counter())]
        for place, (chat, read) in enumerate(chats):
            other = _partner(chats, place)
            if other is None:
                continue
            try:
                with one_sample():
                    parts = read()
                    if swapped:
                        theirs = other[1]()
                        files = zip(chat.media, other[0].media, strict=True)
                        parts = {mine.file: theirs[another.file] for mine, another in files}
                    sequences += sequences_of(chat, tokenizer, data, model, parts)
            except SampleError:
                continue
    rows = _pack_all(sequences, data, tokenizer.end_of_text)
    rows += [_pack_all([], data, tokenizer.end_of_text)[0] for _ in range(-len(rows) % data_world_size)]
    return rows[data_rank::data_world_size]


def _partner(chats: list[tuple[Chat, Callable]], place: int) -> tuple[Chat, Callable] | None:
    """Next chat with media of the same kinds and another answer, None where there is none."""

    def kinds(chat: Chat) -> list[tuple[str, bool]]:
        return [(medium.kind, medium.sound) for medium in chat.media]

    mine = chats[place][0]
    for chat, read in chats[place + 1 :] + chats[:place]:
        if chat.media and kinds(chat) == kinds(mine) and chat.turns[-1].text != mine.turns[-1].text:
            return chat, read
    return None


def _pack_all(sequences: list[TokenSequence], data: DataConfig, padding_token: int) -> list[PackedBatch]:
    """Rows of all sequences; one row of padding where there is none."""
    rows: list[PackedBatch] = []
    to_row = packer(data, padding_token)
    while sequences or not rows:
        chosen = (
            best_fit([(aligned(len(one), data.alignment),) for one in sequences], (data.row_tokens,))
            if sequences
            else []
        )
        rows.append(to_row([sequences[index] for index in chosen]))
        sequences = [one for index, one in enumerate(sequences) if index not in chosen]
    return rows


def _chats(
    source: ShardFolder, samples: int, refused: Counter[str]
) -> Iterator[tuple[int, Chat, Callable[[], dict[str, bytes]]]]:
    """(number, chat, function that reads its files) of the chats with an answer among the first samples."""
    for index, chat, read in first_samples(source, samples, refused):
        if isinstance(chat, Chat) and any(turn.role == "assistant" for turn in chat.turns):
            yield index, chat, read
