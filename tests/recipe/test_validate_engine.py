"""Every refusal of engines and networks, by its message."""

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.validate import validate

AUT = "stage=audio_encoder data=rehearsal_transcripts"

REFUSED = [
    (
        "engine=deepspeed",
        "engine=deepspeed: does not train network=thinker; set engine=megatron",
    ),
    ("optimizer.ema_decay=0.9", "optimizer.ema_decay=0.9: only engine=deepspeed averages weights; set 0"),
    (
        f"{AUT} engine=megatron",
        "engine=megatron: does not train network=recognizer; set engine=deepspeed",
    ),
    *[
        (
            f"{AUT} parallel.{axis}=2",
            f"parallel.{axis}=2: engine=deepspeed has data ranks alone; set parallel.{axis}=1",
        )
        for axis in ("pipeline", "context")
    ],
    (f"{AUT} zero.stage=4", "zero.stage=4: must be at most 3"),
    (f"{AUT} zero.whole_below=-1", "zero.whole_below=-1: must be at least 0"),
    (f"{AUT} optimizer.ema_decay=1", "optimizer.ema_decay=1.0: must be below 1"),
    (f"{AUT} optimizer=muon", "optimizer.name=muon: engine=deepspeed trains with adamw; set optimizer=adamw"),
    (
        f"{AUT} precision=bf16 zero.stage=0",
        "zero.stage=0: precision=bf16 keeps its fp32 weights in ZeRO's optimizer; set 1, 2 or 3",
    ),
    (
        f"{AUT} precision=fp32 zero.stage=0 zero.offload_optimizer=true",
        "zero.offload_optimizer=True: zero.stage=0 has no optimizer of ZeRO's; set a stage from 1 to 3",
    ),
    (
        "stage=codec data=rehearsal_crops recompute=full",
        "recompute=full: network=codec keeps its activations; set recompute=none",
    ),
    (
        f"{AUT} evaluation.swap_media=true",
        "evaluation.swap_media=True: network=recognizer answers no questions; set it to false",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(words, message):
    with pytest.raises(UserError) as error:
        validate(load_recipe(words.split()), world_size=None)
    assert str(error.value) == message
