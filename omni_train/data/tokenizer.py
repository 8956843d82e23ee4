"""Text to token ids, from a Hugging Face tokenizer folder, light enough for a loader worker."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from omni_train.errors import UserError

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

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


class Tokenizer:
    """A byte-level tokenizer whose control tokens only code can write: the same characters in a sample stay text."""

    def __init__(self, folder: str | Path):
        """Load ``folder/tokenizer.json``. Raises UserError when it is missing, damaged, or lacks ChatML's tokens."""
        self.folder = Path(folder)
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"data.tokenizer={folder}: no tokenizer.json there; name a tokenizer folder")
        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
            for token in spec["added_tokens"]:
                token["special"] |= token["content"] in CONTROL_TOKENS
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer={folder}: tokenizer.json is not readable ({error})") from None
        self._tokenizer.encode_special_tokens = True  # as ordinary text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.im_start, self.im_end, self.end_of_text = map(self.token_id, (IM_START, IM_END, END_OF_TEXT))

    @property
    def size(self) -> int:
        """One more than the largest id: the rows that an embedding must have."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token_id(self, name: str) -> int:
        """The id of a control token. Raises UserError when the tokenizer has none of that name."""
        token = self._tokenizer.token_to_id(name)
        if token is None:
            raise UserError(
                f"data.tokenizer={self.folder}: no token {name}; use a tokenizer with Qwen's control tokens"
            )
        return token

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_after(self, prefix: str, text: str) -> tuple[list[int], int]:
        """Ids of ``prefix + text``, and the index of the first one that covers any of ``text``.

        Tokens may straddle the border (two line ends are one token), so encoding the halves apart is not the same.
        """
        encoding = self._tokenizer.encode(prefix + text, add_special_tokens=False)
        border = next((i for i, (_, end) in enumerate(encoding.offsets) if end > len(prefix)), len(encoding.ids))
        return encoding.ids, border

    def decode(self, tokens: list[int]) -> str:
        """The text of ids, control tokens included."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
