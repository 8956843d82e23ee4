"""Correspondence of ``config.json`` and our model configuration, in both directions.

A key keeps its name wherever it can. The list of layers, the rotary embedding's keys and the coefficient of the
balancing loss differ: at perfect balance transformers' loss equals num_experts_per_tok and ours 1, so our coefficient
is theirs times num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from omni_train.errors import UserError
from omni_train.interop.encoder_config import (
    audio_from_hugging_face,
    audio_to_hugging_face,
    require,
    require_values,
    vision_from_hugging_face,
    vision_to_hugging_face,
)
from omni_train.interop.families import FAMILIES, Family
from omni_train.recipe.schema import ModelConfig, ThinkerConfig

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
)
_OF_ALL_PARTS = ("vocab_size", "initializer_range")
_LAYER_TYPES = {"linear_attention": "G", "full_attention": "*"}
# Keys that change the numbers, and the only value that this model computes, which a missing key has.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "norm_topk_prob": True,
    "use_qk_norm": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
    "mtp_use_dedicated_embeddings": False,
    "quantization_config": None,
    "rope_type": "default",
    "type": "default",
    "mrope_interleaved": True,
}


def from_hugging_face(format: str, config: dict[str, Any], name: str, tensors: Collection[str]) -> ModelConfig:
    """Model configuration from a ``config.json``.

    Args:
        format: a key of ``FAMILIES``.
        config: the file's content.
        name: name of the model.
        tensors: names of the folder's tensors, which tell whether there are a vision encoder and a
            multi-token-prediction layer; the file says so even where ``save_pretrained`` has dropped them.

    Raises:
        UserError: the file is of another family, lacks a key, or has a value that this model does not compute.
    """
    family = FAMILIES[format]
    thinker = config.get(family.thinker, {}) if family.thinker else config
    text = thinker.get("text_config", thinker)
    if text.get("model_type") != family.text_type:
        given = text.get("model_type", config.get("model_type"))
        raise UserError(f"config.json: model_type={given}; format={format} reads {family.text_type}")
    require_values(config, {"quantization_config": None})
    text = {**family.defaults, **text, **(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    require_values(text, {**_FIXED, "attn_output_gate": family.fixed["attention_output_gate"], **family.fixed})
    hidden = require(text, "hidden_size")
    if family.thinker:
        text.setdefault("head_dim", hidden // require(text, "num_attention_heads"))
    values = {key: require(text, key) for key in (*_SAME, *family.sizes)}
    if family.feed_forward == "E":
        values["router_aux_loss_coef"] = require(text, "router_aux_loss_coef") * values["num_experts_per_tok"]
    values["pattern"], values["repeats"] = _shortest(_layers(text, family))
    values["mtp_num_hidden_layers"] = int(any(tensor.startswith("mtp.") for tensor in tensors))
    if family.names.audio:
        values["audio"] = audio_from_hugging_face(require(thinker, "audio_config"), hidden)
    if family.names.audio or any(tensor.startswith(family.names.vision) for tensor in tensors):
        deepstack = family.names.deepstack is not None
        values["vision"] = vision_from_hugging_face(require(thinker, "vision_config"), hidden, deepstack)
    thinker = ThinkerConfig(
        **{key: value for key, value in values.items() if key not in (*_OF_ALL_PARTS, "audio", "vision")}
        | dict(
            tie_word_embeddings=thinker.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            rope_theta=float(require(text, "rope_theta")),
            partial_rotary_factor=text["partial_rotary_factor"],
            mrope_section=list(text["mrope_section"]),
        )
        | family.fixed
    )
    parts = {key: values[key] for key in (*_OF_ALL_PARTS, "audio", "vision") if key in values}
    return ModelConfig(name=name, thinker=thinker, **parts)


def to_hugging_face(format: str, model: ModelConfig, whole: bool) -> dict[str, Any]:
    """``config.json`` of a model, without the type of its parameters.

    Args:
        format: a key of ``FAMILIES``.
        model: our configuration.
        whole: whether the folder is of a whole model, rather than of a language model alone.

    Raises:
        UserError: the format cannot hold this model.
    """
    family = FAMILIES[format]
    _check(format, family, model)
    text = _text_to_hugging_face(family, model)
    if not whole:
        return {"architectures": [family.text_architecture], **text}
    thinker = {"text_config": text, "tie_word_embeddings": model.thinker.tie_word_embeddings}
    if model.vision:
        deepstack = family.names.deepstack is not None
        thinker["vision_config"] = vision_to_hugging_face(model.vision, model.thinker.hidden_size, deepstack)
    if model.audio:
        thinker["audio_config"] = audio_to_hugging_face(model.audio, model.thinker.hidden_size)
    config = {family.thinker: thinker} if family.thinker else thinker
    return {"architectures": [family.architecture], "model_type": family.model_type, **config}


def merged(ours: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` with our values over the original's, nested keys included."""
    out = dict(original)
    for key, value in ours.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(value, out[key]) if both else value
    return out


def _check(format: str, family: Family, model: ModelConfig) -> None:
    thinker = model.thinker
    symbols = thinker.pattern.replace("|", "") * thinker.repeats
    if set(symbols[::2]) - set(family.mixers) or set(symbols[1::2]) != {family.feed_forward}:
        raise UserError(
            f"model.thinker.pattern={thinker.pattern}: must be layers {' or '.join(family.mixers)}, each followed by "
            f"{family.feed_forward}, with format={format}"
        )
    for key, value in family.fixed.items():
        if (given := getattr(thinker, key)) != value:
            raise UserError(f"model.thinker.{key}={given}: must be {value} with format={format}")
    if "shared_expert_intermediate_size" in family.sizes and not thinker.shared_expert_intermediate_size:
        raise UserError(
            f"model.thinker.shared_expert_intermediate_size=0: must be above 0 with format={format}, whose every layer "
            "has a shared expert"
        )
    if model.audio and not family.names.audio:
        raise UserError(f"model.audio: must be null with format={format}, which has no audio encoder")
    if family.names.audio and not (model.audio and model.vision):
        raise UserError(f"model={model.name}: must have an audio and a vision encoder with format={format}")


def _text_to_hugging_face(family: Family, model: ModelConfig) -> dict[str, Any]:
    thinker = model.thinker
    symbols = thinker.pattern.replace("|", "") * thinker.repeats
    out = {
        "model_type": family.text_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_hidden_layers": len(symbols) // 2,
        "tie_word_embeddings": thinker.tie_word_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": thinker.rope_theta,
            "partial_rotary_factor": thinker.partial_rotary_factor,
            "mrope_section": list(thinker.mrope_section),
            "mrope_interleaved": True,
        },
        **{key: getattr(model if key in _OF_ALL_PARTS else thinker, key) for key in (*_SAME, *family.sizes)},
    }
    if "G" in family.mixers:
        names = {symbol: name for name, symbol in _LAYER_TYPES.items()}
        out["layer_types"] = [names[symbol] for symbol in symbols[::2]]
        out["mtp_num_hidden_layers"] = thinker.mtp_num_hidden_layers
    if family.feed_forward == "E":
        out["router_aux_loss_coef"] = thinker.router_aux_loss_coef / thinker.num_experts_per_tok
    return out


def _layers(text: Mapping[str, Any], family: Family) -> str:
    count = text.get("num_hidden_layers")
    every = text["full_attention_interval"]
    kinds = text.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(count or 0)
    ]
    if not kinds or len(kinds) != count:
        raise UserError(f"config.json: num_hidden_layers={count} must be the number of layer_types, {len(kinds)}")
    for kind in kinds:
        if _LAYER_TYPES.get(kind, " ") not in family.mixers:
            known = " or ".join(name for name, symbol in _LAYER_TYPES.items() if symbol in family.mixers)
            raise UserError(f"config.json: layer_types has {kind}; must be {known}")
    return "".join(_LAYER_TYPES[kind] + family.feed_forward for kind in kinds)


def _shortest(symbols: str) -> tuple[str, int]:
    """Shortest pattern that gives these layers when repeated, and how often."""
    for length in range(2, len(symbols) + 1, 2):
        repeats, rest = divmod(len(symbols), length)
        if not rest and symbols[:length] * repeats == symbols:
            return symbols[:length], repeats
    raise AssertionError("a whole pattern repeats itself once")
