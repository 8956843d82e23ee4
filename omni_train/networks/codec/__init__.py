"""Specifications of the speech codec, waveform to codes and back, and of Code2Wav alone; both on the ZeRO engine."""

from __future__ import annotations

from pathlib import Path

from omni_train.networks.base import NetworkSpec
from omni_train.networks.codec.checks import check_code2wav, check_codec
from omni_train.recipe.schema import EngineName


def _teacher(recipe):
    """Teacher of codebook 0, a WavLM or a recognizer, where the recipe has one."""
    from omni_train import platform
    from omni_train.frozen.recognizer import open_recognizer
    from omni_train.frozen.wavlm import WavLM, is_wavlm

    teacher = recipe.codec_training.teacher
    if teacher is None:
        return {}
    return {"teacher": WavLM(teacher, platform.device()) if is_wavlm(teacher) else open_recognizer(teacher, recipe)}


def _build_codec(recipe, frozen):
    from omni_train.models.codec import SpeechCodec

    size = frozen["teacher"].size if "teacher" in frozen else 0  # of the head that learns its features
    return _beside_discriminators(recipe, SpeechCodec(recipe.model.codec, recipe.model.code2wav, size))


def _build_code2wav(recipe, frozen):
    from omni_train.models.code2wav import Code2Wav

    return _beside_discriminators(recipe, Code2Wav(recipe.model.code2wav))


def _beside_discriminators(recipe, generator):
    from omni_train import platform
    from omni_train.models.config import params_dtype
    from omni_train.models.discriminators import Discriminators

    where = (platform.device(), params_dtype(recipe.precision))
    discriminators = Discriminators(recipe.codec_training.discriminators)
    return {"generator": generator.to(*where), "discriminators": discriminators.to(*where)}


def _codec_objective(recipe, networks, frozen):
    from omni_train.objectives.codec import CodecTraining

    return CodecTraining(*networks.values(), recipe.codec_training, recipe.seed, frozen.get("teacher"))


def _code2wav_objective(recipe, networks, frozen):
    from omni_train.data.samples.lengths import codec_sampling_rate
    from omni_train.objectives.codec import Code2WavTraining

    return Code2WavTraining(*networks.values(), recipe.codec_training, codec_sampling_rate(recipe.model))


def _evaluation(recipe, held_out, refused, frozen):
    from omni_train.evaluation.resynthesis import Resyntheses
    from omni_train.frozen.recognizer import open_recognizer

    recognizer = recipe.evaluation.recognizer
    listener = open_recognizer(recognizer, recipe) if recognizer else frozen.get("teacher")
    directory = Path(recipe.runs_dir, recipe.run)
    return Resyntheses(recipe, held_out, refused, directory, getattr(listener, "transcribe", None))


CODEC = NetworkSpec(
    name="codec",
    engines=(EngineName.deepspeed,),
    rows="crops",
    parts=("codec", "code2wav"),
    settings=("codec_training",),
    check=check_codec,
    frozen=_teacher,
    build=_build_codec,
    objective=_codec_objective,
    evaluation=_evaluation,
)
CODE2WAV = NetworkSpec(
    name="code2wav",
    engines=(EngineName.deepspeed,),
    rows="crops",
    parts=("code2wav",),
    optional_parts=("codec",),
    settings=("codec_training",),
    check=check_code2wav,
    build=_build_code2wav,
    objective=_code2wav_objective,
    evaluation=_evaluation,
)
