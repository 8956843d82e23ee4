"""Rendering of a chat's texts, control tokens and media to tokens and rotary ids."""

from __future__ import annotations

from omni_train.data.samples.clips import Clip
from omni_train.data.samples.layout import Marks, Stamp
from omni_train.data.samples.positions import Run, Text
from omni_train.data.samples.tokenizer import Tokenizer


class Rendering:
    """Sequence that is being rendered: parts of text that are not yet encoded, and runs for the rotary ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens: list[int] = []  # of text and control tokens; media have pads
        self.learned: list[bool] = []  # of the same
        self.runs: list[Run] = []
        self._tokenizer = tokenizer
        self._texts: list[tuple[str, bool]] = []  # not encoded yet: neighbours are encoded together
        self._begin: int | None = None  # index into ``tokens`` at which the run of text that is growing began
        self._continues = False  # of that run

    def __len__(self) -> int:
        return sum(run.length for run in self.runs)

    def text(self, text: str, *, learned: bool = False, continues: bool = False) -> None:
        if text:
            self._open(continues)
            self._texts.append((text, learned))

    def control(self, token: int, *, learned: bool = False) -> None:
        self._encode()
        self._open()
        self.tokens.append(token)
        self.learned.append(learned)

    def clip(self, clip: Clip) -> None:
        for item in clip.items:
            if isinstance(item, Stamp):
                self.text(item.text, continues=item.continues)
                continue
            self.close()
            if isinstance(item, Marks):
                self._open(item.continues)
                for name in item.names:
                    self.control(self._tokenizer.token_id(name))
                self.close()
            else:
                self.runs.append(item)

    def close(self) -> None:
        """End the current run of text, if any."""
        self._encode()
        if self._begin is not None:
            self.runs.append(Text(len(self.tokens) - self._begin, self._continues))
            self._begin = None

    def _open(self, continues: bool = False) -> None:
        """Begin a run of text, unless there is a current one."""
        if self._begin is None:
            self._begin, self._continues = len(self.tokens), continues

    def _encode(self) -> None:
        if self._texts:
            texts, learned = zip(*self._texts, strict=True)
            tokens, owners = self._tokenizer.encode_parts(texts)
            self.tokens += tokens
            self.learned += [learned[owner] for owner in owners]
            self._texts = []


def rendered_length(clip: Clip, tokenizer: Tokenizer) -> int:
    """Number of tokens of a clip, with its control tokens and timestamps."""
    rendering = Rendering(tokenizer)
    rendering.clip(clip)
    rendering.close()
    return len(rendering)
