"""Evaluation of the Thinker in the loop: held-out questions are answered, and the answers scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omni_train import platform
from omni_train.data.rows.questions import Question
from omni_train.data.samples.kinds import medium_kinds
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.evaluation.base import Cell, Evaluated, Medium
from omni_train.models.thinker import Thinker
from omni_train.recipe.schema import Recipe
from omni_train.rollout.generate import generate
from omni_train.rollout.scoring import Tally, score


@dataclass
class Prediction:
    """A question and the model's answer."""

    question: Question
    answer: str
    table = "predictions"

    def line(self) -> str:
        """See :class:`Exhibit`."""
        asked, media = self.question, " ".join(f"<{medium.kind}>" for medium, _ in self.question.media)
        return f"{asked.name}  {media} {asked.text!r} -> {self.answer!r} (expected {asked.answer!r})"

    def cells(self) -> dict[str, Cell]:
        """See :class:`Exhibit`: the question, its answer, and the first file of each kind of media."""
        asked = self.question
        media = {
            medium.kind: Medium(medium.kind, f"questions/{asked.name}/{Path(medium.file).name}", content)
            for medium, content in reversed(asked.media)
        }
        return {
            "name": asked.name,
            "task": asked.meta.get("task"),
            **{kind: media.get(kind) for kind in medium_kinds()},
            "question": asked.text,
            "expected": asked.answer,
            "answer": self.answer,
        }


class Answers:
    """Evaluation that answers the recipe's held-out questions greedily, the same ones every time.

    Args:
        recipe: its ``evaluation`` says how answers are generated and scored.
        questions: held-out questions of this data rank.
        refused: how many questions could not be read, by reason.
    """

    def __init__(self, recipe: Recipe, questions: list[Question], refused: Counter[str]) -> None:
        self.config, self.row_tokens = recipe.evaluation, recipe.data.row_tokens
        self.tokenizer = Tokenizer(recipe.data.tokenizer)
        self.questions, self.refused = questions, refused

    def __call__(self, model: Thinker) -> Evaluated:
        """Answer and score all questions. Collective.

        Args:
            model: the whole Thinker, unwrapped.

        Returns:
            metrics over the questions of all ranks, named ``eval_…`` after
            :func:`omni_train.rollout.scoring.score`; this rank's first answers as exhibits.
        """
        ends = (self.tokenizer.im_end, self.tokenizer.end_of_text)
        generated = generate(
            model,
            [question.prompt for question in self.questions],
            max_new_tokens=self.config.max_new_tokens,
            stop_tokens=ends,
            row_tokens=self.row_tokens,
        )
        tally, predictions = Tally.of_refused(self.refused), []
        for question, written in zip(self.questions, generated, strict=False):  # fewer where a signal cut it short
            text = self.tokenizer.decode([token for token in written.tokens if token not in ends]).strip()
            score(tally, question.meta, question.answer, text, self.config.normalizer)
            predictions.append(Prediction(question, text))
        everywhere = Tally()
        for part in platform.parallel.gather_over_data_ranks(tally):
            everywhere += part
        metrics = {f"eval_{name}": value for name, value in everywhere.metrics().items()}
        return Evaluated(metrics, predictions[: self.config.print_samples])
