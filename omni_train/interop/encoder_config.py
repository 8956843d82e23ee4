"""Correspondence of ``audio_config``, ``vision_config`` and our encoders' configurations, in both directions."""

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
# Keys that change the numbers, and the only value that our encoders compute, which a missing key has.
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


def require(source: Mapping[str, Any], key: str, where: str = "") -> Any:
    """Value of a key that must be there.

    Args:
        source: a ``config.json``, or a part of it.
        key: the key.
        where: path of the part, for the message.

    Raises:
        UserError: the key is missing, or null.
    """
    if source.get(key) is None:
        raise UserError(f"config.json: {where}{key} is missing")
    return source[key]


def require_values(source: Mapping[str, Any], fixed: Mapping[str, Any], where: str = "") -> None:
    """Refuse keys whose value is not the only one that is computed here.

    Args:
        source: a ``config.json``, or a part of it.
        fixed: value of each key; a missing key has it.
        where: path of the part, for the message.

    Raises:
        UserError: naming the first key with another value.
    """
    for key, value in fixed.items():
        if source.get(key, value) != value:
            raise UserError(f"config.json: {where}{key}={source[key]}: must be {value}")


def audio_from_hugging_face(config: Mapping[str, Any], output_size: int) -> AudioEncoderConfig:
    """Configuration of our audio encoder from an ``audio_config``, its training window being the released one.

    Args:
        config: that part of the file.
        output_size: hidden size of the language model.

    Raises:
        UserError: a key is missing, or has a value that our encoder does not compute.
    """
    where = "audio_config."
    require_values(config, {**_FIXED_AUDIO, "output_dim": output_size}, where)
    values = {ours: require(config, theirs, where) for ours, theirs in _AUDIO.items()}
    chunk, window = 2 * require(config, "n_window", where), values["eval_window_frames"]
    if window % chunk:
        raise UserError(f"config.json: {where}n_window_infer={window}: must be a multiple of 2·n_window={chunk}")
    return AudioEncoderConfig(
        num_convolutions=_AUDIO_CONVOLUTIONS, chunk_frames=chunk, train_window_frames=[window], **values
    )


def audio_to_hugging_face(audio: AudioEncoderConfig, output_size: int) -> dict[str, Any]:
    """``audio_config`` of our audio encoder.

    Raises:
        UserError: the format cannot hold this encoder.
    """
    expressible = {
        "num_convolutions": audio.num_convolutions == _AUDIO_CONVOLUTIONS,
        "chunk_frames": audio.chunk_frames % 2 == 0,
        "eval_window_frames": audio.eval_window_frames > 0 and audio.eval_window_frames % audio.chunk_frames == 0,
    }
    for key, yes in expressible.items():
        if not yes:
            raise UserError(
                f"model.audio.{key}={getattr(audio, key)}: the format needs {_AUDIO_CONVOLUTIONS} convolutions, chunks "
                "of an even number of frames, and windows of whole chunks"
            )
    return {theirs: getattr(audio, ours) for ours, theirs in _AUDIO.items()} | {
        "n_window": audio.chunk_frames // 2,
        "output_dim": output_size,
    }


def vision_from_hugging_face(config: Mapping[str, Any], output_size: int, deepstack: bool) -> VisionEncoderConfig:
    """Configuration of our vision encoder from a ``vision_config``.

    Args:
        config: that part of the file.
        output_size: hidden size of the language model.
        deepstack: whether the family has DeepStack.

    Raises:
        UserError: a key is missing, or has a value that our encoder does not compute.
    """
    where = "vision_config."
    require_values(config, {**_FIXED_VISION, "out_hidden_size": output_size}, where)
    values = {key: require(config, key, where) for key in _VISION}
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(values[key], int):
            raise UserError(f"config.json: {where}{key}={values[key]}: must be one number")
    if deepstack:
        levels = list(require(config, "deepstack_visual_indexes", where))
        if levels != sorted(set(levels)):
            raise UserError(f"config.json: {where}deepstack_visual_indexes={levels}: must be rising layers")
        values["deepstack_visual_indexes"] = levels
    else:
        require_values(config, {"deepstack_visual_indexes": []}, where)
    return VisionEncoderConfig(**values)


def vision_to_hugging_face(vision: VisionEncoderConfig, output_size: int, deepstack: bool) -> dict[str, Any]:
    """``vision_config`` of our vision encoder.

    Raises:
        UserError: the encoder has DeepStack, and the format does not.
    """
    config = {key: getattr(vision, key) for key in _VISION} | {"out_hidden_size": output_size}
    levels = list(vision.deepstack_visual_indexes)
    if deepstack:
        config["deepstack_visual_indexes"] = levels
    elif levels:
        raise UserError(f"model.vision.deepstack_visual_indexes={levels}: must be [] in this format, without DeepStack")
    return config
