"""Every refusal of the recognizer, its rows and their augmentation, by its message."""

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.validate import validate

AUT = "stage=audio_encoder"

REFUSED = [
    (
        f"{AUT} model=qwen3_5_0_8b",
        "network=recognizer: model=qwen3_5_0_8b has no model.audio; choose a model with it",
    ),
    (
        f"{AUT} model.recognizer=null",
        "network=recognizer: model=tiny has no model.recognizer; choose a model with it",
    ),
    (
        f"{AUT} data=rehearsal_audio",
        "data.rows=chats: network=recognizer learns from data.rows=transcripts; choose data that has them",
    ),
    (
        "data=rehearsal_transcripts",
        "data.rows=transcripts: network=thinker learns from data.rows=chats; choose data that has them",
    ),
    (f"{AUT} model.recognizer.num_hidden_layers=0", "model.recognizer.num_hidden_layers=0: must be at least 1"),
    (
        f"{AUT} model.recognizer.num_attention_heads=5",
        "model.recognizer.hidden_size=96: not a multiple of its heads=5; change one of the two",
    ),
    (
        f"{AUT} model.recognizer.hidden_size=99 model.recognizer.num_attention_heads=3",
        "model.recognizer.hidden_size=99: not a multiple of the two halves of its positions=2; change one of the two",
    ),
    (f"{AUT} recognition.ctc_weight=-0.5", "recognition.ctc_weight=-0.5: must be at least 0"),
    (
        f"{AUT} recognition.ctc_weight=0.5 model.recognizer.ctc=false",
        "recognition.ctc_weight=0.5: there is no CTC head; set model.recognizer.ctc=true, or 0",
    ),
    (f"{AUT} recognition.beam=0", "recognition.beam=0: must be at least 1"),
    (
        f"{AUT} recognition.eval_windows=[100,0]",
        "recognition.eval_windows[1]=0: must be at least 1; whole clips are always evaluated",
    ),
    (f"{AUT} data.augmentation.time_masks=-1", "data.augmentation.time_masks=-1: must be at least 0"),
    (f"{AUT} data.augmentation.noise_probability=1.5", "data.augmentation.noise_probability=1.5: must be at most 1"),
    (
        f"{AUT} data.augmentation.speeds=[0.9,3]",
        "data.augmentation.speeds[1]=3.0: must be at most 2.0; empty changes none",
    ),
    (
        f"{AUT} data.augmentation.noise_snr_db=[9,3]",
        "data.augmentation.noise_snr_db=[9.0, 3.0]: must be two rising numbers",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(overrides, message):
    recipe = load_recipe(overrides.split(" "))
    with pytest.raises(UserError) as error:
        validate(recipe, world_size=None)
    assert str(error.value) == message


def test_the_large_model_pre_trains_its_encoder():
    recipe = load_recipe([AUT, "model=flash_35b_a3b"])
    validate(recipe, world_size=None)
    assert [source.weight for source in recipe.data.sources] == [3.5, 3.5, 3.0]
