"""Which key of a Qwen3.5 ``config.json`` is which of ours, in both directions.

A key keeps its name wherever it can. Different are the list of layers, the rotary embedding's keys, and the coefficient
of the balancing loss: at perfect balance transformers' loss equals num_experts_per_tok and ours 1, so our coefficient
is theirs times num_experts_per_tok.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omni_train.errors import UserError
from omni_train.recipe.schema import ModelConfig


@dataclass(frozen=True)
class Family:
    """One of the formats of ``omni-train convert``."""

    architecture: str
    model_type: str
    feed_forward: str  # its letter in a layer pattern
    sizes: tuple[str, ...]  # keys of its own


FAMILIES = {
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        "E",
        ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
    ),
    "qwen3_5": Family("Qwen3_5ForCausalLM", "qwen3_5_text", "-", ("intermediate_size",)),
}

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_LAYER_TYPES = {"linear_attention": "G", "full_attention": "*"}
# Keys that change the numbers, and the only value that this model computes. A key that is left out has it.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "use_sliding_window": False,
    "mtp_use_dedicated_embeddings": False,
    "quantization_config": None,
}
_FIXED_ROPE = {"rope_type": "default", "type": "default", "mrope_interleaved": True}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a ``config.json``, which in a multimodal model's is one level down."""
    return config.get("text_config", config)


def from_hugging_face(format: str, config: dict[str, Any], name: str, mtp: bool) -> ModelConfig:
    """Our configuration of the model that a ``config.json`` describes.

    Args:
        format: a key of ``FAMILIES``.
        config: the file's content.
        name: of the model.
        mtp: whether there is a multi-token-prediction layer. The file is not asked: it says so even where
            ``save_pretrained`` has dropped the tensors.

    Raises:
        UserError: it is another family, a key is missing, or a key has a value that this model does not compute.
    """
    family, text = FAMILIES[format], text_config(config)
    if text.get("model_type") != family.model_type:
        raise UserError(f"config.json: model_type={text.get('model_type')}; format={format} reads {family.model_type}")
    rope = {**text, **(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    for key, value in {**_FIXED, **_FIXED_ROPE}.items():
        given = (rope if key in _FIXED_ROPE else text).get(key, value)
        if given != value:
            raise UserError(f"config.json: {key}={given}: only {value} is supported")

    def need(source: Mapping[str, Any], key: str) -> Any:
        if source.get(key) is None:
            raise UserError(f"config.json: {key} is missing")
        return source[key]

    values = {key: need(text, key) for key in (*_SAME, *family.sizes)}
    if format == "qwen3_5_moe":
        values["router_aux_loss_coef"] = need(text, "router_aux_loss_coef") * values["num_experts_per_tok"]
    values["pattern"], values["repeats"] = _shortest(_layers(text, family.feed_forward))
    return ModelConfig(
        name=name,
        rope_theta=float(need(rope, "rope_theta")),
        partial_rotary_factor=rope.get("partial_rotary_factor", 0.25),  # the defaults of transformers' class
        mrope_section=list(rope.get("mrope_section", [11, 11, 10])),
        mtp_num_hidden_layers=int(mtp),
        **values,
    )


def to_hugging_face(format: str, model: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of our model, without the type of its parameters.

    Raises:
        UserError: the family has no such model.
    """
    family = FAMILIES[format]
    symbols = model.pattern.replace("|", "") * model.repeats
    if set(symbols[::2]) - set(_LAYER_TYPES.values()) or set(symbols[1::2]) != {family.feed_forward}:
        raise UserError(
            f"model.pattern={model.pattern}: format={format} has layers G or *, each followed by {family.feed_forward}"
        )
    if format == "qwen3_5_moe" and not model.shared_expert_intermediate_size:
        raise UserError(f"model.shared_expert_intermediate_size=0: format={format} has a shared expert in every layer")
    names = {symbol: name for name, symbol in _LAYER_TYPES.items()}
    config = dataclasses.asdict(model)
    out = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_hidden_layers": len(symbols) // 2,
        "layer_types": [names[symbol] for symbol in symbols[::2]],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rope_theta,
            "partial_rotary_factor": model.partial_rotary_factor,
            "mrope_section": list(model.mrope_section),
            "mrope_interleaved": True,
        },
        "mtp_num_hidden_layers": model.mtp_num_hidden_layers,
        **{key: config[key] for key in (*_SAME, *family.sizes)},
    }
    if format == "qwen3_5_moe":
        out["router_aux_loss_coef"] = model.router_aux_loss_coef / model.num_experts_per_tok
    return out


def _layers(text: Mapping[str, Any], feed_forward: str) -> str:
    count = text.get("num_hidden_layers")
    every = text.get("full_attention_interval", 4)
    kinds = text.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(count or 0)
    ]
    if not kinds or len(kinds) != count:
        raise UserError(f"config.json: num_hidden_layers={count} but layer_types has {len(kinds)}")
    for kind in kinds:
        if kind not in _LAYER_TYPES:
            raise UserError(f"config.json: layer_types has {kind}; only {' and '.join(_LAYER_TYPES)} are supported")
    return "".join(_LAYER_TYPES[kind] + feed_forward for kind in kinds)


def _shortest(symbols: str) -> tuple[str, int]:
    """The shortest pattern that gives these layers when repeated, and how often."""
    for length in range(2, len(symbols) + 1, 2):
        repeats, rest = divmod(len(symbols), length)
        if not rest and symbols[:length] * repeats == symbols:
            return symbols[:length], repeats
    raise AssertionError("a whole pattern repeats itself once")
