"""Checks of the codec and of Code2Wav: their sizes, crops and losses."""

from __future__ import annotations

from math import prod

from omni_train.networks.encoders import check_parts
from omni_train.recipe.refusals import answers_no_questions, divides, keeps_activations, refuse
from omni_train.recipe.schema import Recipe, required


def check_codec(recipe: Recipe) -> None:
    """Refuse a codec whose halves do not fit, crops that are not its own, and losses without a meaning.

    Raises:
        UserError: the first thing found, in one line.
    """
    check_parts(recipe)
    _model(recipe)
    _crops(recipe)
    _losses(recipe)
    keeps_activations(recipe)
    answers_no_questions(recipe)


def check_code2wav(recipe: Recipe) -> None:
    """Refuse a Code2Wav as :func:`check_codec` does, and settings that need an encoder or codebooks.

    Raises:
        UserError: the first thing found, in one line.
    """
    check_codec(recipe)
    if recipe.data.codec is None:
        refuse(
            recipe,
            "data.codec",
            "network=code2wav learns from codes; name the codec's checkpoint that `omni-train data codes` was given",
        )
    if recipe.codec_training.teacher is not None:
        refuse(recipe, "codec_training.teacher", "network=code2wav has no codebook to teach; set null")


def _model(recipe: Recipe) -> None:
    model, code2wav = recipe.model, required(recipe.model.code2wav)
    wave = "model.code2wav"
    pairs = 2 * code2wav.num_attention_heads  # rotary embedding turns pairs of a head's dimensions
    divides(recipe, pairs, f"2·{wave}.num_attention_heads", f"{wave}.hidden_size")
    divides(recipe, code2wav.num_key_value_heads, f"{wave}.num_key_value_heads", f"{wave}.num_attention_heads")
    halved = 2 ** len(code2wav.upsample_rates)
    divides(recipe, halved, f"what each of {wave}.upsample_rates halves", f"{wave}.decoder_dim")
    if model.codec is None:
        return
    codec = "model.codec"
    divides(recipe, 2, "a pair of dimensions", f"{codec}.head_dim")
    divides(recipe, model.codec.num_key_value_heads, f"{codec}.num_key_value_heads", f"{codec}.num_attention_heads")
    divides(recipe, model.codec.compress, f"{codec}.compress", f"{codec}.num_filters")
    # Two frames of the encoder become one of the codes.
    encoded, synthesized = 2 * prod(model.codec.upsampling_ratios), _frame_samples(recipe)
    if encoded != synthesized:
        refuse(
            recipe,
            "model.codec.upsampling_ratios",
            f"must make frames of {synthesized} samples, as model.code2wav does, not {encoded}; change one of the two",
        )
    for key in ("num_quantizers", "codebook_size"):
        if getattr(model.codec, key) != getattr(code2wav, key):
            refuse(recipe, f"model.codec.{key}", f"model.code2wav.{key} is {getattr(code2wav, key)}; set both")
    if model.codec.num_semantic_quantizers >= model.codec.num_quantizers:
        refuse(
            recipe,
            "model.codec.num_semantic_quantizers",
            f"must leave some of model.codec.num_quantizers={model.codec.num_quantizers} for sound; lower it",
        )


def _frame_samples(recipe: Recipe) -> int:
    code2wav = required(recipe.model.code2wav)
    return prod([*code2wav.upsampling_ratios, *code2wav.upsample_rates])


def _crops(recipe: Recipe) -> None:
    data, codec = recipe.data, recipe.model.codec
    rate = codec.sampling_rate if codec is not None else 24000
    frames = data.crop_seconds * rate / _frame_samples(recipe)
    if abs(frames - round(frames)) > 1e-6 or frames < 1:
        second = rate / _frame_samples(recipe)
        refuse(recipe, "data.crop_seconds", f"is no whole number of frames, of which a second has {second:g}")
    divides(recipe, round(frames), "the frames of a crop (data.crop_seconds)", "data.row_tokens")
    if data.alignment != 1:
        refuse(recipe, "data.alignment", "crops are equally long; set 1")
    samples = round(frames) * _frame_samples(recipe)
    windows = {
        "codec_training.mel_windows": recipe.codec_training.mel_windows,
        "codec_training.discriminators.stft_windows": recipe.codec_training.discriminators.stft_windows,
    }
    for key, lengths in windows.items():
        if any(length < 4 or length % 4 or length > samples for length in lengths):
            refuse(recipe, key, f"must be multiples of 4 samples, at most the {samples} of a crop")


def _losses(recipe: Recipe) -> None:
    training = recipe.codec_training
    discriminators = training.discriminators
    if len(training.mel_windows) != len(training.mel_bins):
        refuse(recipe, "codec_training.mel_bins", "must be mel bins, a number for each of mel_windows")
    if training.perceptual_weight > 0:
        if training.teacher is None:
            refuse(
                recipe, "codec_training.perceptual_weight", "needs codec_training.teacher to listen; name one, or set 0"
            )
        if recipe.frozen.offload:
            refuse(recipe, "frozen.offload", "the teacher listens in the forward and backward pass; set false")
    if discriminators.periods and not discriminators.period_channels:
        refuse(recipe, "codec_training.discriminators.period_channels", "must be channels of a layer at least")
    adversarial = training.adversarial_weight > 0 or training.feature_weight > 0
    if adversarial and not (discriminators.stft_windows or discriminators.periods):
        refuse(
            recipe,
            "codec_training.discriminators.stft_windows",
            "there is no discriminator; give windows or periods, or set adversarial_weight and feature_weight to 0",
        )
