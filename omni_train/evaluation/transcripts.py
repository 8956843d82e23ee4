"""Evaluation of the recognizer in the loop: held-out clips are transcribed, and the transcripts scored."""

from __future__ import annotations

from collections import Counter

from omni_train import platform
from omni_train.data.rows.questions import Question
from omni_train.data.rows.transcripts import split_tag
from omni_train.data.samples.language import language_of
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.evaluation.answers import Prediction
from omni_train.evaluation.base import Evaluated
from omni_train.models.recognizer import SpeechRecognizer
from omni_train.recipe.schema import Recipe
from omni_train.rollout.scoring import Tally, score
from omni_train.rollout.transcribe import transcribe

WHOLE_CLIPS = 0


class Transcripts:
    """Evaluation that transcribes the recipe's held-out clips, the same ones every time, whole and in windows.

    Args:
        recipe: its ``evaluation`` and ``recognition`` say how clips are transcribed and scored.
        questions: held-out clips of this data rank, with their transcripts as answers.
        refused: how many clips could not be read, by reason.
    """

    def __init__(self, recipe: Recipe, questions: list[Question], refused: Counter[str]) -> None:
        self.config, self.recognition = recipe.evaluation, recipe.recognition
        self.tokenizer = Tokenizer(recipe.data.tokenizer)
        self.questions, self.refused = questions, refused

    def __call__(self, model: SpeechRecognizer) -> Evaluated:
        """Transcribe and score all clips. Collective.

        Args:
            model: the recognizer, whole and unwrapped.

        Returns:
            metrics over the clips of all ranks: ``eval_wer_LANGUAGE``, ``eval_cer_LANGUAGE`` as
            :func:`omni_train.rollout.scoring.score` says, ``eval_wer`` and ``eval_cer`` over all languages that have
            them, ``eval_language``, how often the language was named rightly, and ``eval_answers_transcribe``, how many
            were transcribed; again with the suffix ``_window_FRAMES`` for each of ``recognition.eval_windows``, the
            audio encoder's attention windows in streaming. This rank's exhibits are transcripts of whole clips.
        """
        whole = self._in_window(model, WHOLE_CLIPS)
        for window in self.recognition.eval_windows:
            of_window = self._in_window(model, window).metrics
            whole.metrics |= {f"{name}_window_{window}": value for name, value in of_window.items()}
        return whole

    def _in_window(self, model: SpeechRecognizer, window_frames: int) -> Evaluated:
        transcripts = transcribe(
            model,
            [question.prompt.mel[0] for question in self.questions],
            window_frames=window_frames,
            start_token=self.tokenizer.im_start,
            stop_token=self.tokenizer.im_end,
            max_new_tokens=self.config.max_new_tokens,
            beam=self.recognition.beam,
        )
        tally, predictions = Tally.of_refused(self.refused), []
        for question, transcript in zip(self.questions, transcripts, strict=True):
            words = [token for token in transcript.tokens if token != self.tokenizer.im_end]
            language, text = split_tag(words, self.tokenizer)
            meta = {**question.meta, "task": "transcribe"}
            score(tally, meta, question.answer, text, self.config.normalizer)
            if (right := language_of(question.meta)).spaced is not None:
                tally.add("language", language_of({"language": language}).code == right.code, 1)
            predictions.append(Prediction(question, text))
        everywhere = Tally()
        for part in platform.parallel.gather_over_data_ranks(tally):
            everywhere += part
        pooled = {kind: everywhere.pooled(kind) for kind in ("cer", "wer")}
        metrics = everywhere.metrics() | {kind: value for kind, value in pooled.items() if value is not None}
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        return Evaluated(metrics, predictions[: self.config.print_samples])
