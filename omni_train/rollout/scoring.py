"""Scores of answers by their task: word and character error rates, exact match, errors in seconds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jiwer

from omni_train import plugins
from omni_train.data.samples.language import language_of
from omni_train.recipe.schema import Normalizer
from omni_train.rollout.normalisation import answer_form, transcript_form
from omni_train.rollout.seconds import seconds

CLOSE_SECONDS = 1.0
"""Largest error of a time that counts as right, in seconds."""


@dataclass
class Tally:
    """Metrics summed over answers, which add up over ranks: a metric with weights is a mean, one without a count."""

    sums: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_refused(cls, reasons: Mapping[str, int]) -> Tally:
        """Tally of the samples that cannot be read, counted as ``skipped_REASON``."""
        return cls(Counter({f"skipped_{reason}": count for reason, count in reasons.items()}))

    def add(self, name: str, value: float, weight: float | None = None) -> None:
        """Add `value` to the count `name`, or with a weight to the mean `name`."""
        self.sums[name] += value
        if weight is not None:
            self.weights[name] += weight

    def __iadd__(self, other: Tally) -> Tally:
        self.sums.update(other.sums)
        self.weights.update(other.weights)
        return self

    def pooled(self, kind: str) -> float | None:
        """Weighted mean over all metrics named ``KIND_…`` together; None without any."""
        names = [name for name in self.weights if name.startswith(f"{kind}_")]
        weight = sum(self.weights[name] for name in names)
        return sum(self.sums[name] for name in names) / weight if weight else None

    def metrics(self) -> dict[str, float]:
        """Means and counts by name, in the order of the names; means without weight are left out."""
        return {
            name: self.sums[name] / self.weights[name] if name in self.weights else float(self.sums[name])
            for name in sorted(self.sums)
            if self.weights.get(name, 1)
        }


def score(
    tally: Tally,
    meta: Mapping[str, Any],
    reference: str,
    answer: str,
    normalizer: Normalizer = Normalizer.basic,
) -> None:
    """Add the score of one answer to a tally.

    ``meta["task"]`` says which metrics, beside the number of answers ``answers_TASK``:

    - ``transcribe``: ``cer_LANGUAGE``, and ``wer_LANGUAGE`` where words are spaced: edits per character or word of all
      references together. LANGUAGE is the code of ``meta["language"]``; where that is not understood it is ``unknown``,
      words are not counted, and ``unknown_language`` says how often
    - ``when``: ``when_seconds_error``, mean over the answers that hold a time; ``when_close``, the fraction of all
      within CLOSE_SECONDS; ``when_unparsable``, how many hold no time
    - a task that was registered: what its function adds
    - any other: ``exact_TASK``, the fraction that equal the reference in :func:`answer_form`

    Args:
        tally: what the score is added to.
        meta: of the sample.
        reference: the right answer.
        answer: the model's answer.
        normalizer: of transcripts, see :func:`transcript_form`.

    Raises:
        UserError: a module of OMNI_TRAIN_PLUGINS cannot be imported.
    """
    plugins.load()
    task = _named(meta.get("task"))
    tally.add(f"answers_{task}", 1)
    _TASKS.get(task, _exact)(tally, meta, reference, answer, normalizer)


def register(task: str, scored: Score) -> None:
    """Add a task. The module that does so has to be named in OMNI_TRAIN_PLUGINS, for all ranks score.

    Args:
        task: ``meta["task"]`` of its samples.
        scored: adds the score of one of its answers to a tally, called as :func:`score` is.

    Raises:
        ValueError: there is one of that name.
    """
    if _named(task) in _TASKS:
        raise ValueError(f"task {task} is registered already")
    _TASKS[_named(task)] = scored


def _named(task: Any) -> str:
    return re.sub(r"[^\w.-]+", "_", str(task or "answer"))


def _exact(tally: Tally, meta: Mapping[str, Any], reference: str, answer: str, normalizer: Normalizer) -> None:
    tally.add(f"exact_{_named(meta.get('task'))}", answer_form(reference) == answer_form(answer), 1)


def _time(tally: Tally, meta: Mapping[str, Any], reference: str, answer: str, normalizer: Normalizer) -> None:
    right, given = seconds(reference), seconds(answer)
    if right is None:
        _exact(tally, meta, reference, answer, normalizer)
        return
    error = abs(given - right) if given is not None else float("inf")
    tally.add("when_seconds_error", *((error, 1) if given is not None else (0, 0)))
    tally.add("when_close", error <= CLOSE_SECONDS, 1)
    tally.add("when_unparsable", given is None)


def _transcript(tally: Tally, meta: Mapping[str, Any], reference: str, answer: str, normalizer: Normalizer) -> None:
    language = language_of(meta)
    reference, answer = (transcript_form(text, language.code, normalizer) for text in (reference, answer))
    if language.spaced:
        words = jiwer.process_words(reference, answer)
        edits = words.substitutions + words.deletions + words.insertions
        tally.add(f"wer_{language.code}", edits, len(reference.split()))
    elif language.spaced is None:
        tally.add("unknown_language", 1)
    else:
        reference, answer = reference.replace(" ", ""), answer.replace(" ", "")
    letters = jiwer.process_characters(reference, answer)
    edits = letters.substitutions + letters.deletions + letters.insertions
    tally.add(f"cer_{language.code}", edits, len(reference))


Score = Callable[[Tally, Mapping[str, Any], str, str, Normalizer], None]
_TASKS: dict[str, Score] = {"transcribe": _transcript, "when": _time}
