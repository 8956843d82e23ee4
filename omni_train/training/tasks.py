"""What the ZeRO engine trains of a recipe's network, and how that is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omni_train import platform
from omni_train.objectives.task import Task
from omni_train.recipe.schema import NetworkName, Recipe
from omni_train.training.checkpoint_store import resolve
from omni_train.training.feed import Feed


def build_task(recipe: Recipe) -> Task:
    """The recipe's networks with what they minimise, on this rank's device.

    Raises:
        UserError: the codec's teacher is none.
    """
    if recipe.network is NetworkName.recognizer:
        from omni_train.objectives.recognition import Recognition

        return Recognition(recipe)
    from omni_train.models.code2wav import Code2Wav
    from omni_train.models.codec import SpeechCodec
    from omni_train.models.discriminators import Discriminators
    from omni_train.models.thinker.config import params_dtype
    from omni_train.objectives.codec import Code2WavTraining, CodecTraining

    model, training, where = recipe.model, recipe.codec_training, (platform.device(), params_dtype(recipe.precision))
    judges = Discriminators(training.discriminators).to(*where)
    if recipe.network is NetworkName.code2wav:
        rate = model.codec.sampling_rate if model.codec else 24000
        return Code2WavTraining(Code2Wav(model.code2wav).to(*where), judges, training, rate)
    teacher = _teacher(recipe)
    codec = SpeechCodec(model.codec, model.code2wav, teacher.size if teacher else 0).to(*where)
    return CodecTraining(codec, judges, training, recipe.seed, teacher)


def build_evaluation(recipe: Recipe, feed: Feed) -> Callable:
    """What answers held-out questions with plain networks: returns figures, and what is to be shown."""
    if recipe.network is NetworkName.recognizer:
        from omni_train.training.recognition_evaluation import RecognitionEvaluation

        run = RecognitionEvaluation(recipe, feed)
        return lambda networks: run(networks["model"])
    from omni_train.training.codec_evaluation import CodecEvaluation

    teacher = recipe.codec_training.teacher
    recognizer = recipe.evaluation.recognizer or (None if teacher and _is_wavlm(teacher) else teacher)
    transcribe = _listener(recognizer, recipe).transcribe if recognizer else None
    run = CodecEvaluation(recipe, Path(recipe.runs_dir, recipe.run), transcribe)
    return lambda networks: run(networks["generator"])


def _teacher(recipe: Recipe):
    """Whoever teaches codebook 0 what speech means: a WavLM, a recognizer, or None."""
    teacher = recipe.codec_training.teacher
    if teacher is None:
        return None
    if _is_wavlm(teacher):
        from omni_train.objectives.semantic import WavLMTeacher

        return WavLMTeacher(teacher, platform.device())
    return _listener(teacher, recipe)


def _listener(checkpoint: str, recipe: Recipe):
    """The recognizer of a checkpoint or a run."""
    from omni_train.training.listener import Listener

    return Listener(resolve(checkpoint), recipe)


def _is_wavlm(teacher: str) -> bool:
    """A folder of `transformers` has its configuration; a checkpoint or a run has none of that name."""
    return Path(teacher, "config.json").exists()
