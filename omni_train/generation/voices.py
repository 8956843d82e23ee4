"""Who is to speak: a name of a Talker's, another utterance, or a description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from omni_train.data.rows.speech import reference_of
from omni_train.data.samples.files import read_regular
from omni_train.data.samples.media import read_audio
from omni_train.data.samples.sample import SampleError
from omni_train.errors import UserError
from omni_train.frozen.codec import OpenCodec
from omni_train.recipe.schema import Recipe, TalkerStyle, required

SILENCE = 1e-3
"""Largest sample of a reference, −60 dB, below which it is silent, whatever the codec makes of that."""


def read_voice(recipe: Recipe, voice: str | None, description: str | None, codec: OpenCodec | None) -> dict[str, Any]:
    """Voice as ``stream_before`` takes it.

    Args:
        recipe: recipe of the Talker.
        voice: a name of ``model.talker.speaker_ids`` with ``dual_track``, else the file of a reference utterance.
        description: of the voice.
        codec: the codec that the Talker's codes are of, where it encodes.

    Raises:
        UserError: the Talker has learned no such voice, or nothing is heard in the file.
    """
    talker, speech = required(recipe.model.talker), recipe.data.speech
    if talker.style is TalkerStyle.dual_track:
        names = ", ".join(talker.speaker_ids)
        if description is not None:
            raise UserError(f"description={description}: the Talker speaks in voices with names; give voice={names}")
        if voice not in talker.speaker_ids:
            said = "voice= is missing" if voice is None else f"voice={voice}: the Talker has no such voice"
            raise UserError(f"{said}; choose one of {names}")
        return {"speaker": talker.speaker_ids[voice]}
    if description is not None and speech.voice_description == 0:
        raise UserError(f"description={description}: the Talker has read none (data.speech.voice_description=0)")
    found: dict[str, Any] = {"description": description and description.strip()}
    if voice is not None:
        if speech.voice_reference == 0:
            raise UserError(f"voice={voice}: the Talker has heard no other utterance (data.speech.voice_reference=0)")
        if codec is None:
            raise UserError(f"voice={voice}: needs the codec's encoder; give codec= a checkpoint of network=codec")
        found["reference"] = _reference(Path(voice), codec, recipe)
    return found


def _reference(file: Path, codec: OpenCodec, recipe: Recipe) -> np.ndarray:
    """Codes (Q, frames) of the beginning of a reference utterance."""
    data = recipe.data
    try:
        sound = read_regular(file, data.max_sample_bytes)
        waveform = read_audio(sound, data.media, end=data.speech.voice_seconds, sampling_rate=codec.sampling_rate)
        if np.abs(waveform).max() < SILENCE:
            raise SampleError("voice_empty")
        return reference_of(codec.encode(waveform), data, recipe.model)
    except (OSError, ValueError) as error:
        raise UserError(f"voice={file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except SampleError as error:
        why = "nothing is heard in it, or only noise" if error.reason == "voice_empty" else f"refused as {error.reason}"
        raise UserError(f"voice={file}: {why}; give a few seconds of somebody who speaks") from None
