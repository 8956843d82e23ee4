"""From a sample to token sequences with labels: ChatML for chats, plain text for documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omni_train.data.batch import IGNORE
from omni_train.data.sample import Chat, Document, Sample, SampleError
from omni_train.data.tokenizer import Tokenizer
from omni_train.recipe.schema import LossOn


@dataclass
class TokenSequence:
    """What packing keeps whole: a sample, or one piece of a document that is longer than a row."""

    tokens: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32, shifted: labels[i] is the token that position i predicts, or IGNORE
    begins_sample: bool = True

    def __len__(self) -> int:
        return len(self.tokens)


def tokenize(sample: Sample, tokenizer: Tokenizer, *, row_tokens: int, loss_on: LossOn) -> list[TokenSequence]:
    """The sequences of a sample, each at most ``row_tokens`` long.

    A long document is cut into pieces of a whole row and a rest; positions start anew in each piece, and the label at
    the end of a piece is the first token of the next. Raises SampleError: ``too_long`` for a chat that does not fit in
    a row, ``no_loss`` for one without anything to learn.
    """
    if isinstance(sample, Document):
        tokens = [*tokenizer.encode(sample.text), tokenizer.end_of_text]
        learned = [True] * len(tokens)
    else:
        tokens, learned = chat_tokens(sample, tokenizer, loss_on)
        if not any(learned):
            raise SampleError("no_loss")
        if len(tokens) > row_tokens:
            raise SampleError("too_long")
    tokens = np.array(tokens, dtype=np.int32)
    labels = np.full_like(tokens, IGNORE)
    labels[:-1] = np.where(learned[1:], tokens[1:], IGNORE)
    return [
        TokenSequence(tokens[start : start + row_tokens], labels[start : start + row_tokens], start == 0)
        for start in range(0, len(tokens) - 1, row_tokens)  # the last token predicts nothing: no piece begins at it
    ]


def chat_tokens(chat: Chat, tokenizer: Tokenizer, loss_on: LossOn) -> tuple[list[int], list[bool]]:
    """ChatML ids of a chat, and which of them are to be predicted: the content of learned turns and its ``<|im_end|>``.

    The same ids as Qwen's chat template without thinking gives, except that control tokens spelled in the content stay
    text.
    """
    newline = tokenizer.encode("\n")
    tokens: list[int] = []
    learned: list[bool] = []
    for turn in chat.turns:
        learn = turn.role == "assistant" or loss_on == LossOn.all
        body, content = tokenizer.encode_after(f"{turn.role}\n", turn.text)
        tokens += [tokenizer.im_start, *body, tokenizer.im_end, *newline]
        learned += [False] * (1 + content) + [learn] * (len(body) - content + 1) + [False] * len(newline)
    return tokens, learned
