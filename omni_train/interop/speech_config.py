"""Correspondence of Mimi's or Code2Wav's ``config.json`` and our configurations, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from omni_train.errors import UserError
from omni_train.interop.encoder_config import require, require_values
from omni_train.models.codec.encoder import frame_samples
from omni_train.recipe.schema import Code2WavConfig, CodecConfig

# Keys that change the numbers, and the only value that our networks compute, which a missing key has.
_FIXED = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
    "rope_type": "default",
    "type": "default",
}
_FIXED_MIMI = {
    "audio_channels": 1,
    "use_causal_conv": True,
    "pad_mode": "constant",
    "use_conv_shortcut": False,
    "hidden_act": "gelu",
    **_FIXED,
}
_FIXED_CODE2WAV = {"hidden_act": "silu", **_FIXED}
_CODEC = [field.name for field in fields(CodecConfig)]
_CODE2WAV = [field.name for field in fields(Code2WavConfig)]


def codec_from_hugging_face(config: Mapping[str, Any]) -> CodecConfig:
    """Sizes of encoder and quantiser, from a MimiModel's ``config.json``.

    Raises:
        UserError: the file is another model's, lacks a key, or has a value that our codec does not compute.
    """
    if config.get("model_type") != "mimi":
        raise UserError(f"config.json: model_type={config.get('model_type')}: must be mimi with format=mimi")
    config = _flat(config)
    config.setdefault("head_dim", require(config, "hidden_size") // require(config, "num_attention_heads"))
    dim = require(config, "codebook_dim")
    require_values(config, {**_FIXED_MIMI, "vector_quantization_hidden_dimension": dim})
    codec = CodecConfig(**{key: require(config, key) for key in _CODEC})
    if dim == codec.hidden_size:
        raise UserError(f"config.json: codebook_dim={dim}: must differ from hidden_size, as codebooks need projections")
    require_values(config, {"frame_rate": codec.sampling_rate / frame_samples(codec)})
    return codec


def codec_to_hugging_face(codec: CodecConfig) -> dict[str, Any]:
    """``config.json`` of a MimiModel without a decoder.

    Raises:
        UserError: a MimiModel cannot have these sizes.
    """
    if codec.codebook_size & (codec.codebook_size - 1):
        raise UserError(f"model.codec.codebook_size={codec.codebook_size}: must be a power of 2 with format=mimi")
    return {
        "architectures": ["MimiModel"],
        "model_type": "mimi",
        "decoder_config": None,
        "vector_quantization_hidden_dimension": codec.codebook_dim,
        **{key: value for key, value in _FIXED_MIMI.items() if key not in _FIXED},
        **_to_hugging_face(codec, _CODEC),
    }


def code2wav_from_hugging_face(config: Mapping[str, Any]) -> Code2WavConfig:
    """Sizes of Code2Wav, from its own ``config.json`` or a whole Qwen3-Omni's.

    Raises:
        UserError: a key is missing, or has a value that our Code2Wav does not compute.
    """
    config = _flat(config.get("code2wav_config", config))
    require_values(config, _FIXED_CODE2WAV)
    if config.get("head_dim"):
        require_values(config, {"head_dim": require(config, "hidden_size") // require(config, "num_attention_heads")})
    return Code2WavConfig(**{key: require(config, key) for key in _CODE2WAV})


def code2wav_to_hugging_face(code2wav: Code2WavConfig) -> dict[str, Any]:
    """``config.json`` of a Code2Wav alone."""
    return {
        "architectures": ["Qwen3OmniMoeCode2Wav"],
        "hidden_act": "silu",
        **_to_hugging_face(code2wav, _CODE2WAV),
    }


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration with the rotary embedding's keys among the others, tuples as lists, and nulls left out."""
    flat = {"rope_theta": 10000.0, **config, **(config.get("rope_parameters") or {})}
    flat["rope_theta"] = float(flat["rope_theta"])
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items() if value is not None}


def _to_hugging_face(config: CodecConfig | Code2WavConfig, keys: list[str]) -> dict[str, Any]:
    values = {key: getattr(config, key) for key in keys}
    values = {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in values.items()}
    theta = values.pop("rope_theta")
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **values,
    }
