"""How the samples of a shard are drawn, and what is held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

from omni_train.data_pipelines.rehearsal.phrases import LANGUAGES

Sample = tuple[dict[str, Any], dict[str, bytes]]  # the fields of key.json, and its media by their names
SHARDS = {"train": 8, "val": 1}  # of each kind
HELD_OUT = sum(SHARDS.values())  # one combination in so many


class World(Random):
    """The draws of one shard: the same name and split give the same samples.

    Training and validation draw from different combinations of properties (sentences, voices, scenes), so that what is
    measured on held-out samples was never rendered for training, while each single property was.
    """

    def __init__(self, name: str, split: str, languages: Sequence[str] = tuple(LANGUAGES)):
        super().__init__(f"{name} {split}")
        self.held_out, self.languages = split != "train", languages  # codes of what is spoken

    def admits(self, *combinations: tuple) -> bool:
        """Whether a sample of these combinations belongs to this split: held out is one with any that is."""
        return any(map(is_held_out, combinations)) == self.held_out


def is_held_out(combination: tuple) -> bool:
    """True for about one combination in ``HELD_OUT``, by nothing but its values."""
    return int.from_bytes(hashlib.sha256(repr(combination).encode()).digest()[:8]) % HELD_OUT == 0


def attach(media: dict[str, bytes], kind: str, extension: str, data: bytes, **fields: Any) -> dict[str, Any]:
    """Put a file among the ``media`` of a sample; returns the part of a message that names it."""
    name = f"{len(media)}.{extension}"
    media[name] = data
    return {"type": kind, kind: name, **fields}


def conversation(*turns: tuple[list[dict[str, Any] | str], str], **meta: Any) -> dict[str, Any]:
    """The fields of a chat: each turn is what the user gives, media and texts, and what the assistant answers.

    ``meta`` holds the last answer as ``answer``, the one that an evaluation asks for.
    """
    messages = []
    for given, answer in turns:
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in given]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": meta | {"answer": turns[-1][1]}}


def seconds(time: float) -> str:
    """A time as it is answered: ``2.5 seconds``."""
    return f"{time:.1f} seconds"
