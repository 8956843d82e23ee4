"""What the ZeRO engine trains of a recipe's network, and how that is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omni_train import platform
from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.store import resolve
from omni_train.models.config import params_dtype
from omni_train.objectives.task import Task
from omni_train.recipe.schema import Recipe

if TYPE_CHECKING:
    from omni_train.objectives.semantic import Teacher
    from omni_train.training.feed import Feed


def build_networks(recipe: Recipe, teacher: Teacher | None = None) -> dict[str, torch.nn.Module]:
    """The recipe's networks, fresh, on this rank's device; a codec has a head for the teacher's features."""
    model, where = recipe.model, (platform.device(), params_dtype(recipe.precision))
    if recipe.network == "recognizer":
        from omni_train.models.recognizer import SpeechRecognizer

        return {"model": SpeechRecognizer(recipe)}
    from omni_train.models.code2wav import Code2Wav
    from omni_train.models.codec import SpeechCodec
    from omni_train.models.discriminators import Discriminators

    if recipe.network == "code2wav":
        generator = Code2Wav(model.code2wav)
    else:
        generator = SpeechCodec(model.codec, model.code2wav, teacher.size if teacher else 0)
    judges = Discriminators(recipe.codec_training.discriminators)
    return {"generator": generator.to(*where), "discriminators": judges.to(*where)}


def build_task(recipe: Recipe) -> Task:
    """The recipe's networks with what they minimise, on this rank's device.

    Raises:
        UserError: the codec's teacher is none.
    """
    if recipe.network == "recognizer":
        from omni_train.objectives.recognition import Recognition

        return Recognition(recipe, **build_networks(recipe))
    from omni_train.objectives.codec import Code2WavTraining, CodecTraining

    training, codec = recipe.codec_training, recipe.model.codec
    if recipe.network == "code2wav":
        rate = codec.sampling_rate if codec else 24000
        return Code2WavTraining(*build_networks(recipe).values(), training, rate)
    teacher = _teacher(recipe)
    return CodecTraining(*build_networks(recipe, teacher).values(), training, recipe.seed, teacher)


def build_evaluation(recipe: Recipe, feed: Feed, teacher: Teacher | None = None) -> Callable:
    """What answers held-out questions with plain networks: returns figures, and what is to be shown.

    Args:
        teacher: of the task; a recognizer among them also listens, where the recipe names no other.
    """
    if recipe.network == "recognizer":
        from omni_train.evaluation.transcripts import RecognitionEvaluation

        run = RecognitionEvaluation(recipe, *feed.questions())
        return lambda networks: run(networks["model"])
    from omni_train.evaluation.resynthesis import CodecEvaluation

    recognizer = recipe.evaluation.recognizer
    listener = _listener(recognizer, recipe) if recognizer else teacher
    run = CodecEvaluation(recipe, Path(recipe.runs_dir, recipe.run), getattr(listener, "transcribe", None))
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
    """The recognizer of a checkpoint or a run. Collective."""
    from omni_train.frozen.recognizer import Listener

    found = resolve(checkpoint)
    require_intact(found, recipe.checkpoint.verify, only=("model.pt", "model*.safetensors"))
    return Listener(found, recipe)


def _is_wavlm(teacher: str) -> bool:
    """A folder of `transformers` has its configuration; a checkpoint or a run has none of that name."""
    return Path(teacher, "config.json").exists()
