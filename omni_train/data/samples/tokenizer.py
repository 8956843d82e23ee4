"""Tokenizer of a Hugging Face folder, light enough for a loader worker."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
import tokenizers.decoders

from omni_train.data.samples.files import read_regular
from omni_train.errors import UserError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

# Headers, questions, timestamps: texts that come again and again are encoded once.
REPEATED_CHARACTERS = 256
REPEATED_TEXTS = 4096

LARGEST_TOKENIZER = 1 << 28  # bytes of tokenizer.json; those of vocabularies of 250k have 20 MB

# The control tokens of Qwen3.5 in the order of their ids.
CONTROL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<tts_pad>",
    "<tts_text_bos>",
    "<tts_text_eod>",
    "<tts_text_bos_single>",
    "<|audio_pad|>",
)


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer in its folder, which may hold a whole model beside them."""


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy the files of a tokenizer, and nothing else, from one folder to another."""
    to.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, to / name)


class Tokenizer:
    """Byte-level tokenizer whose control tokens only code can write: the same characters in a sample stay text."""

    def __init__(self, folder: str | Path):
        """Load ``folder/tokenizer.json``.

        Raises:
            UserError: the file is missing, damaged, or lacks ChatML's tokens.
        """
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"data.tokenizer={folder}: no tokenizer.json there; name a tokenizer folder")
        try:
            spec = json.loads(read_regular(file, LARGEST_TOKENIZER).decode("utf-8-sig"))
            for token in spec["added_tokens"]:
                token["special"] |= token["content"] in CONTROL_TOKENS
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer={folder}: tokenizer.json is not readable ({error})") from None
        self._tokenizer.encode_special_tokens = True  # as ordinary text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._encode_repeated = functools.lru_cache(REPEATED_TEXTS)(self._encode_parts)
        self.im_start, self.im_end, self.end_of_text = map(self.token_id, (IM_START, IM_END, END_OF_TEXT))

    @property
    def size(self) -> int:
        """Number of rows that an embedding must have: one more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def longest(self) -> int:
        """Most characters that a token stands for; one that is not ASCII counts as several."""
        return max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))

    def token_id(self, name: str) -> int:
        """Id of a control token.

        Raises:
            UserError: the tokenizer has none of that name.
        """
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise UserError(
                f"data.tokenizer={self.folder}: no token {name}; use a tokenizer with Qwen's control tokens"
            )
        return token

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_parts(self, texts: Sequence[str]) -> tuple[Sequence[int], Sequence[int]]:
        """Ids of joined texts, and for each id the index of the text in which it ends.

        Tokens may straddle a border (two line ends are one token), so encoding the texts apart is not the same.
        """
        short = sum(map(len, texts)) <= REPEATED_CHARACTERS
        return (self._encode_repeated if short else self._encode_parts)(tuple(texts))

    def _encode_parts(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        encoding = self._tokenizer.encode("".join(texts), add_special_tokens=False)
        ids = tuple(encoding.ids)
        if len(texts) == 1:
            return ids, (0,) * len(ids)
        borders = list(itertools.accumulate(map(len, texts)))
        return ids, tuple(bisect.bisect_left(borders, end) for _, end in encoding.offsets)

    def decode(self, tokens: list[int]) -> str:
        """Text of ids, control tokens included."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def decoder(self) -> Callable[[int], str]:
        """Function that is given ids one by one, and returns the text that each completes: no half characters."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
        return lambda token: stream.step(self._tokenizer, token) or ""
