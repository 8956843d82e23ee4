"""Evaluation in the loop: held-out questions are answered, and the answers scored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron.core.utils import unwrap_model

from omni_train import platform
from omni_train.data.rows.questions import Question
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import Recipe
from omni_train.rollout.generate import generate
from omni_train.rollout.scoring import Tally, score


@dataclass
class Prediction:
    """A question and the model's answer."""

    question: Question
    answer: str


class Evaluation:
    """Answers the recipe's held-out questions, the same ones every time, greedily."""

    def __init__(self, recipe: Recipe, questions: list[Question], refused: Counter[str]) -> None:
        self.config, self.row_tokens = recipe.evaluation, recipe.data.row_tokens
        self.tokenizer = Tokenizer(recipe.data.tokenizer)
        self.questions, self.refused = questions, refused

    def __call__(self, model) -> tuple[dict[str, float], list[Prediction]]:
        """Collective.

        Args:
            model: the whole Thinker, wrapped or not.

        Returns:
            figures over the questions of all ranks, named ``eval_…`` after :func:`omni_train.rollout.scoring.score`;
            this rank's predictions that are to be shown.
        """
        ends = (self.tokenizer.im_end, self.tokenizer.end_of_text)
        generated = generate(
            unwrap_model(model),
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
        figures = {f"eval_{name}": value for name, value in everywhere.figures().items()}
        return figures, predictions[: self.config.print_samples]
