"""The recognizer: the audio encoder with a decoder that writes transcripts (AuT pre-training), on the ZeRO engine."""

from __future__ import annotations

from omni_train.networks.recognizer.checks import check_recognizer
from omni_train.recipe.networks import NetworkKeys
from omni_train.recipe.schema import EngineName

RECOGNIZER = NetworkKeys(
    name="recognizer",
    engines=(EngineName.deepspeed,),
    rows="transcripts",
    parts=("audio", "recognizer"),
    settings=("recognition",),
    check=check_recognizer,
)
