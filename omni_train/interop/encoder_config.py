"""Which key of ``audio_config`` and ``vision_config`` of a ``config.json`` is which of ours, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_train.errors import UserError
from omni_train.recipe.schema import AudioEncoderConfig, VisionEncoderConfig

# Ours -> theirs.
_AUDIO = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "num_mel_bins": "num_mel_bins",
    "conv_channels": "downsample_hidden_size",
    "eval_window_frames": "n_window_infer",
}
_AUDIO_CONVOLUTIONS = 3
_VISION = (
    "hidden_size",
    "depth",
    "num_heads",
    "intermediate_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "num_position_embeddings",
)
# Keys that change the numbers, and the only value that our encoders compute. A key that is left out has it.
_FIXED_AUDIO = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
_FIXED_VISION = {
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
}


def need(source: Mapping[str, Any], key: str, where: str = "") -> Any:
    """A key's value.

    Raises:
        UserError: there is none.
    """
    if source.get(key) is None:
        raise UserError(f"config.json: {where}{key} is missing")
    return source[key]


def only(source: Mapping[str, Any], fixed: Mapping[str, Any], where: str = "") -> None:
    """Refuse a key with another value than the one that is computed here.

    Raises:
        UserError: naming it.
    """
    for key, value in fixed.items():
        if source.get(key, value) != value:
            raise UserError(f"config.json: {where}{key}={source[key]}: only {value} is supported")


def audio_from_hugging_face(config: Mapping[str, Any], output_size: int) -> AudioEncoderConfig:
    """Our audio encoder of an ``audio_config``, trained with the window that it is released with.

    Args:
        config: its content.
        output_size: the language model's width.

    Raises:
        UserError: a key is missing, or has a value that our encoder does not compute.
    """
    where = "audio_config."
    only(config, {**_FIXED_AUDIO, "output_dim": output_size}, where)
    values = {ours: need(config, theirs, where) for ours, theirs in _AUDIO.items()}
    chunk, window = 2 * need(config, "n_window", where), values["eval_window_frames"]
    if window % chunk:
        raise UserError(
            f"config.json: {where}n_window_infer={window}: only multiples of 2·n_window={chunk} are supported"
        )
    return AudioEncoderConfig(
        num_convolutions=_AUDIO_CONVOLUTIONS, chunk_frames=chunk, train_window_frames=[window], **values
    )


def audio_to_hugging_face(audio: AudioEncoderConfig, output_size: int) -> dict[str, Any]:
    """The ``audio_config`` of our audio encoder.

    Raises:
        UserError: transformers has no such encoder.
    """
    expressible = {
        "num_convolutions": audio.num_convolutions == _AUDIO_CONVOLUTIONS,
        "chunk_frames": audio.chunk_frames % 2 == 0,
        "eval_window_frames": audio.eval_window_frames > 0 and audio.eval_window_frames % audio.chunk_frames == 0,
    }
    for key, yes in expressible.items():
        if not yes:
            raise UserError(
                f"model.audio.{key}={getattr(audio, key)}: the format has {_AUDIO_CONVOLUTIONS} convolutions, chunks "
                "of an even number of frames and windows of whole chunks"
            )
    return {theirs: getattr(audio, ours) for ours, theirs in _AUDIO.items()} | {
        "n_window": audio.chunk_frames // 2,
        "output_dim": output_size,
    }


def vision_from_hugging_face(config: Mapping[str, Any], output_size: int, deepstack: bool) -> VisionEncoderConfig:
    """Our vision encoder of a ``vision_config``.

    Args:
        config: its content.
        output_size: the language model's width.
        deepstack: whether the family has DeepStack.

    Raises:
        UserError: a key is missing, or has a value that our encoder does not compute.
    """
    where = "vision_config."
    only(config, {**_FIXED_VISION, "out_hidden_size": output_size}, where)
    values = {key: need(config, key, where) for key in _VISION}
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(values[key], int):
            raise UserError(f"config.json: {where}{key}={values[key]}: only one number is supported")
    if deepstack:
        levels = list(need(config, "deepstack_visual_indexes", where))
        if levels != sorted(set(levels)):
            raise UserError(f"config.json: {where}deepstack_visual_indexes={levels}: only rising layers are supported")
        values["deepstack_visual_indexes"] = levels
    else:
        only(config, {"deepstack_visual_indexes": []}, where)
    return VisionEncoderConfig(**values)


def vision_to_hugging_face(vision: VisionEncoderConfig, output_size: int, deepstack: bool) -> dict[str, Any]:
    """The ``vision_config`` of our vision encoder.

    Raises:
        UserError: the family has no DeepStack, and the encoder has.
    """
    config = {key: getattr(vision, key) for key in _VISION} | {"out_hidden_size": output_size}
    levels = list(vision.deepstack_visual_indexes)
    if deepstack:
        config["deepstack_visual_indexes"] = levels
    elif levels:
        raise UserError(f"model.vision.deepstack_visual_indexes={levels}: the format has no DeepStack")
    return config
