"""The speech codec, waveform to codes and back, and Code2Wav alone on given codes; both on the ZeRO engine."""

from __future__ import annotations

from omni_train.networks.codec.checks import check_code2wav, check_codec
from omni_train.recipe.networks import NetworkKeys
from omni_train.recipe.schema import EngineName

CODEC = NetworkKeys(
    name="codec",
    engines=(EngineName.deepspeed,),
    rows="crops",
    parts=("codec", "code2wav"),
    settings=("codec_training",),
    check=check_codec,
)
CODE2WAV = NetworkKeys(
    name="code2wav",
    engines=(EngineName.deepspeed,),
    rows="crops",
    parts=("code2wav",),
    optional_parts=("codec",),
    settings=("codec_training",),
    check=check_code2wav,
)
