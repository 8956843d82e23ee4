"""How good an answer is, by what was asked: errors of transcripts, exact matches, seconds."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jiwer

UNSPACED = ("zh", "yue", "ja", "th", "lo", "km", "my")
"""Languages written without spaces, whose transcripts have no word errors to count."""
CLOSE_SECONDS = 1.0
"""How near the right time an answer must be to be right."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")


@dataclass
class Tally:
    """Sums over answers, which add up over ranks; a figure with a weight is a mean, one without a count."""

    sums: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_refused(cls, reasons: Mapping[str, int]) -> Tally:
        """How many samples cannot be read, as ``skipped_REASON``."""
        return cls(Counter({f"skipped_{reason}": count for reason, count in reasons.items()}))

    def add(self, name: str, value: float, weight: float | None = None) -> None:
        """Count `value` under `name`, towards a mean where it has a weight."""
        self.sums[name] += value
        if weight is not None:
            self.weights[name] += weight

    def __iadd__(self, other: Tally) -> Tally:
        self.sums.update(other.sums)
        self.weights.update(other.weights)
        return self

    def pooled(self, kind: str) -> float | None:
        """The mean over all names ``KIND_...`` together; None of nothing."""
        names = [name for name in self.weights if name.startswith(f"{kind}_")]
        weight = sum(self.weights[name] for name in names)
        return sum(self.sums[name] for name in names) / weight if weight else None

    def figures(self) -> dict[str, float]:
        """Means and counts by name, in the order of the names; no mean of nothing."""
        return {
            name: self.sums[name] / self.weights[name] if name in self.weights else float(self.sums[name])
            for name in sorted(self.sums)
            if self.weights.get(name, 1)
        }


def score(tally: Tally, meta: Mapping[str, Any], reference: str, answer: str) -> None:
    """Add one answer to the tally.

    ``meta["task"]`` says what is counted, beside ``answers_TASK``, how many there were:

    - ``transcribe``: ``cer_LANGUAGE``, and ``wer_LANGUAGE`` where words are spaced: edits per character or word of all
      references together
    - ``when``: ``when_seconds_error``, mean over the answers that hold a number; ``when_close``, how many of all are
      within CLOSE_SECONDS; ``when_unparsable``, how many hold none
    - any other: ``exact_TASK``, how many equal the reference but for case, punctuation and spaces
    """
    task = str(meta.get("task") or "answer")
    tally.add(f"answers_{task}", 1)
    if task == "transcribe":
        _transcript(tally, str(meta.get("language") or "unknown"), normalise(reference), normalise(answer))
    elif task == "when" and (right := number(reference)) is not None:
        given = number(answer)
        error = abs(given - right) if given is not None else float("inf")
        tally.add("when_seconds_error", *((error, 1) if given is not None else (0, 0)))
        tally.add("when_close", error <= CLOSE_SECONDS, 1)
        tally.add("when_unparsable", given is None)
    else:
        tally.add(f"exact_{task}", normalise(reference) == normalise(answer), 1)


def _transcript(tally: Tally, language: str, reference: str, answer: str) -> None:
    if language.split("-")[0] in UNSPACED:
        reference, answer = reference.replace(" ", ""), answer.replace(" ", "")
    else:
        words = jiwer.process_words(reference, answer)
        tally.add(f"wer_{language}", words.substitutions + words.deletions + words.insertions, len(reference.split()))
    letters = jiwer.process_characters(reference, answer)
    tally.add(f"cer_{language}", letters.substitutions + letters.deletions + letters.insertions, len(reference))


def normalise(text: str) -> str:
    """Small letters in one form, single spaces, no punctuation or symbols but between digits (3.5)."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("’", "")
    kept = []
    for index, letter in enumerate(text):
        between_digits = text[index - 1 : index].isdigit() and text[index + 1 : index + 2].isdigit()
        drop = unicodedata.category(letter)[0] in "PS" and not between_digits
        kept.append(" " if drop else letter)
    return " ".join("".join(kept).split())


def number(text: str) -> float | None:
    """The first number in a text, its decimals after a point or a comma; None without one."""
    found = _NUMBER.search(unicodedata.normalize("NFKC", text))
    return float(found[0].replace(",", ".")) if found else None
