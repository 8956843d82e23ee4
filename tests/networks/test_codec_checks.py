"""Every refusal of the codec, its crops and its losses, by its message."""

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.validate import validate

CODEC = "stage=codec data=rehearsal_crops"
CODE2WAV = f"stage=code2wav data=rehearsal_crops data.codec={'a' * 64}"

# overrides of the default recipe (tiny), message
REFUSED = [
    ("data=rehearsal_crops", "data.rows=crops: network=thinker "),
    (
        "stage=codec data=rehearsal",
        "data.rows=chats: network=codec learns from data.rows=crops; choose data that has them",
    ),
    # the two halves
    (f"{CODEC} model.code2wav.decoder_dim=0", "model.code2wav.decoder_dim=0: must be at least 1"),
    (
        f"{CODEC} model.code2wav.hidden_size=124",
        "model.code2wav.hidden_size=124: not a multiple of 2·model.code2wav.num_attention_heads=8; change one of "
        "the two",
    ),
    (
        f"{CODEC} model.code2wav.num_key_value_heads=3",
        "model.code2wav.num_attention_heads=4: not a multiple of model.code2wav.num_key_value_heads=3; change one of "
        "the two",
    ),
    (
        f"{CODE2WAV} model.code2wav.decoder_dim=120",
        "model.code2wav.decoder_dim=120: not a multiple of what each of model.code2wav.upsample_rates halves=16; "
        "change one of the two",
    ),
    (f"{CODEC} model.codec.sliding_window=0", "model.codec.sliding_window=0: must be at least 1"),
    (
        f"{CODEC} model.codec.head_dim=33",
        "model.codec.head_dim=33: not a multiple of a pair of dimensions=2; change one of the two",
    ),
    (
        f"{CODEC} model.codec.num_key_value_heads=3",
        "model.codec.num_attention_heads=4: not a multiple of model.codec.num_key_value_heads=3; change one of the two",
    ),
    (
        f"{CODEC} model.codec.compress=3",
        "model.codec.num_filters=8: not a multiple of model.codec.compress=3; change one of the two",
    ),
    (f"{CODEC} model.codec=null", "network=codec: model=tiny has no model.codec; choose a model with it"),
    (f"{CODE2WAV} model.code2wav=null", "network=code2wav: model=tiny has no model.code2wav; choose a model with it"),
    (
        f"{CODEC} model.codec.upsampling_ratios=[8,6,5]",
        "model.codec.upsampling_ratios=[8, 6, 5]: must make frames of 1920 samples, as model.code2wav does, not 480; "
        "change one of the two",
    ),
    (
        f"{CODEC} model.codec.codebook_size=128",
        "model.codec.codebook_size=128: model.code2wav.codebook_size is 256; set both",
    ),
    (
        f"{CODEC} model.codec.num_semantic_quantizers=8",
        "model.codec.num_semantic_quantizers=8: must leave some of model.codec.num_quantizers=8 for sound; lower it",
    ),
    # crops
    (
        f"{CODEC} data.crop_seconds=0.5",
        "data.crop_seconds=0.5: is no whole number of frames, of which a second has 12.5",
    ),
    (f"{CODEC} data.crop_seconds=0", "data.crop_seconds=0.0: must be above 0"),
    (
        f"{CODEC} data.row_tokens=42",
        "data.row_tokens=42: not a multiple of the frames of a crop (data.crop_seconds)=10; change one of the two",
    ),
    (f"{CODEC} data.alignment=2", "data.alignment=2: crops are equally long; set 1"),
    (
        f"{CODEC} codec_training.mel_windows=[64,20000] codec_training.mel_bins=[4,4]",
        "codec_training.mel_windows=[64, 20000]: must be multiples of 4 samples, at most the 19200 of a crop",
    ),
    (
        f"{CODEC} codec_training.discriminators.stft_windows=[66]",
        "codec_training.discriminators.stft_windows=[66]: must be multiples of 4 samples, at most the 19200 of a crop",
    ),
    # losses
    (
        f"{CODEC} codec_training.mel_bins=[4]",
        "codec_training.mel_bins=[4]: must be mel bins, a number for each of mel_windows",
    ),
    (f"{CODEC} codec_training.mel_floor=0", "codec_training.mel_floor=0.0: must be above 0"),
    (
        f"{CODEC} codec_training.discriminators.periods=[0]",
        "codec_training.discriminators.periods[0]=0: must be at least 1",
    ),
    (
        f"{CODEC} codec_training.discriminators.period_channels=[]",
        "codec_training.discriminators.period_channels=[]: must be channels of a layer at least",
    ),
    (
        f"{CODEC} codec_training.discriminators.stft_windows=[] codec_training.discriminators.periods=[]",
        "codec_training.discriminators.stft_windows=[]: there is no discriminator; give windows or periods, or set "
        "adversarial_weight and feature_weight to 0",
    ),
    (
        f"{CODEC} codec_training.perceptual_weight=2",
        "codec_training.perceptual_weight=2.0: needs codec_training.teacher to listen; name one, or set 0",
    ),
    (
        f"{CODEC} codec_training.perceptual_weight=2 codec_training.teacher=wavlm frozen.offload=true",
        "frozen.offload=True: the teacher listens in the forward and backward pass; set false",
    ),
    (f"{CODEC} codec_training.quantized_fraction=1.5", "codec_training.quantized_fraction=1.5: must be at most 1"),
    (f"{CODEC} codec_training.adversarial_start=-1", "codec_training.adversarial_start=-1: must be at least 0"),
    (f"{CODEC} evaluation.utterance_seconds=0", "evaluation.utterance_seconds=0.0: must be above 0"),
    # Code2Wav alone
    (
        "stage=code2wav data=rehearsal_crops",
        "data.codec=None: network=code2wav learns from codes; name the codec's checkpoint that `omni-train data codes` "
        "was given",
    ),
    (
        f"{CODE2WAV} codec_training.teacher=wavlm",
        "codec_training.teacher=wavlm: network=code2wav has no codebook to teach; set null",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(words, message):
    with pytest.raises(UserError) as error:
        validate(load_recipe(words.split()), world_size=None)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [CODEC, CODE2WAV, "stage=codec model=flash_35b_a3b", f"{CODE2WAV} model.codec=null"])
def test_what_works_passes(words):
    validate(load_recipe(words.split()), world_size=None)
