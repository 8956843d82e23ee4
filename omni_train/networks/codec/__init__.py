"""Specifications of the speech codec, waveform to codes and back, and of Code2Wav alone; both on the ZeRO engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from omni_train.networks.base import Frozen, Networks, NetworkSpec
from omni_train.networks.codec.checks import check_code2wav, check_codec
from omni_train.recipe.schema import EngineName, Recipe, required

if TYPE_CHECKING:
    import torch

    from omni_train.evaluation.resynthesis import Resyntheses
    from omni_train.objectives.codec import Code2WavTraining, CodecTraining


def _teacher(recipe: Recipe) -> Frozen:
    """Teacher of codebook 0, a WavLM or a recognizer, where the recipe has one."""
    from omni_train import platform
    from omni_train.frozen.recognizer import open_recognizer
    from omni_train.frozen.wavlm import WavLM, is_wavlm

    teacher = recipe.codec_training.teacher
    if teacher is None:
        return {}
    return {"teacher": WavLM(teacher, platform.device()) if is_wavlm(teacher) else open_recognizer(teacher, recipe)}


def _build_codec(recipe: Recipe, frozen: Frozen) -> Networks:
    from omni_train.models.codec import SpeechCodec

    size = frozen["teacher"].size if "teacher" in frozen else 0  # of the head that learns its features
    codec, code2wav = required(recipe.model.codec), required(recipe.model.code2wav)
    return _beside_discriminators(recipe, SpeechCodec(codec, code2wav, size))


def _build_code2wav(recipe: Recipe, frozen: Frozen) -> Networks:
    from omni_train.models.code2wav import Code2Wav

    return _beside_discriminators(recipe, Code2Wav(required(recipe.model.code2wav)))


def _beside_discriminators(recipe: Recipe, generator: torch.nn.Module) -> Networks:
    from omni_train import platform
    from omni_train.models.config import params_dtype
    from omni_train.models.discriminators import Discriminators

    where = (platform.device(), params_dtype(recipe.precision))
    discriminators = Discriminators(recipe.codec_training.discriminators)
    return {"generator": generator.to(*where), "discriminators": discriminators.to(*where)}


def _codec_objective(recipe: Recipe, networks: Networks, frozen: Frozen) -> CodecTraining:
    from omni_train.objectives.codec import CodecTraining

    generator, discriminators = networks["generator"], networks["discriminators"]
    return CodecTraining(generator, discriminators, recipe.codec_training, recipe.seed, frozen.get("teacher"))


def _code2wav_objective(recipe: Recipe, networks: Networks, frozen: Frozen) -> Code2WavTraining:
    from omni_train.data.samples.lengths import codec_sampling_rate
    from omni_train.objectives.codec import Code2WavTraining

    generator, discriminators = networks["generator"], networks["discriminators"]
    return Code2WavTraining(generator, discriminators, recipe.codec_training, codec_sampling_rate(recipe.model))


def _evaluation(recipe: Recipe, held_out: list, refused: Counter[str], frozen: Frozen) -> Resyntheses:
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
