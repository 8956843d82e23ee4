"""Correspondence of Qwen3-Omni's ``talker_config`` and our Talker's configuration, in both directions.

Keys that the class of transformers has another default for than the released folder are read only where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_train.errors import UserError
from omni_train.interop.encoder_config import require, require_values
from omni_train.recipe.schema import (
    CodePredictorConfig,
    ModelConfig,
    TalkerConfig,
    TalkerStyle,
    TextEmbedding,
    required,
)

TEXT_TYPE = "qwen3_omni_moe_talker_text"
_TEXT = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
_PREDICTOR = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
)
_CONTROLS = {  # ours -> theirs
    "codec_pad_id": "codec_pad_id",
    "codec_bos_id": "codec_bos_id",
    "codec_eos_id": "codec_eos_token_id",
    "codec_nothink_id": "codec_nothink_id",
    "codec_think_bos_id": "codec_think_bos_id",
    "codec_think_eos_id": "codec_think_eos_id",
}
# Keys that change the numbers, and the only value that this model computes, which a missing key has.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_type": "default",
    "type": "default",
}
_FIXED_TEXT = {
    **_FIXED,
    "model_type": TEXT_TYPE,
    "interleaved": True,
    "mrope_interleaved": True,
    "norm_topk_prob": True,
}
# Values of our configuration that all of the format's Talkers have.
_OURS = {
    "style": TalkerStyle.dual_track,
    "text_embedding": TextEmbedding.thinker,
    "partial_rotary_factor": 1.0,
    "attention_output_gate": False,
    "zero_centered_norm": False,
}
EXTRAS = {  # of a folder that is not made from another: ids of the released tokenizer
    "model_type": "qwen3_omni_moe_talker",
    "audio_start_token_id": 151669,
    "audio_end_token_id": 151670,
    "audio_token_id": 151675,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "position_id_per_seconds": 13,
    "seconds_per_chunk": 2,
    "spatial_merge_size": 2,
}


def talker_from_hugging_face(config: Mapping[str, Any], name: str) -> ModelConfig:
    """Model that has the Talker of a Qwen3-Omni alone.

    Args:
        config: the folder's ``config.json``.
        name: name of the model.

    Raises:
        UserError: there is no Talker, a key is missing, or it has a value that our Talker does not compute.
    """
    thinker = require(require(config, "thinker_config"), "text_config", "thinker_config.")
    part = require(config, "talker_config")
    return ModelConfig(
        name=name,
        vocab_size=require(thinker, "vocab_size", "thinker_config.text_config."),
        initializer_range=_flat(require(part, "text_config", "talker_config.")).get("initializer_range", 0.02),
        talker=_talker(part),
    )


def _talker(config: Mapping[str, Any]) -> TalkerConfig:
    """Configuration of our Talker from a ``talker_config``.

    Theirs has no control code that asks for text: ours is the first free one, which their style never uses.
    """
    where = "talker_config."
    require_values(config, {"tie_word_embeddings": False}, where)
    text = _flat(require(config, "text_config", where))
    require(text, "norm_topk_prob", f"{where}text_config.")
    require_values(text, _FIXED_TEXT, f"{where}text_config.")
    codes, groups = require(text, "vocab_size", f"{where}text_config."), require(config, "num_code_groups", where)
    hidden = require(text, "hidden_size", f"{where}text_config.")
    predictor = _flat(require(config, "code_predictor_config", where))
    layers = ["full_attention"] * require(predictor, "num_hidden_layers", f"{where}code_predictor_config.")
    same = {"num_code_groups": groups, "hidden_size": hidden, "layer_types": layers, "use_sliding_window": False}
    require_values(predictor, {**_FIXED, **same}, f"{where}code_predictor_config.")
    codebook_size = require(predictor, "vocab_size", f"{where}code_predictor_config.")
    controls = {ours: require(config, theirs, where) for ours, theirs in _CONTROLS.items()}
    speakers = dict(config.get("speaker_id") or {})
    taken = {*controls.values(), *speakers.values()}
    after = [*range(controls["codec_eos_id"] + 1, codes), *range(codebook_size, codes)]
    if (free := next((code for code in after if code not in taken), None)) is None:
        raise UserError(f"config.json: {where}text_config.vocab_size={codes}: leaves no control code free")
    experts = text.get("num_experts", text.get("num_local_experts"))
    if experts is None:
        raise UserError(f"config.json: {where}text_config.num_experts is missing")
    values = {key: require(text, key, f"{where}text_config.") for key in _TEXT}
    coefficient = require(text, "router_aux_loss_coef", f"{where}text_config.")
    return TalkerConfig(
        **values,
        **controls,
        **_OURS,
        pattern="*E",
        repeats=require(text, "num_hidden_layers", f"{where}text_config."),
        head_dim=text.get("head_dim") or hidden // values["num_attention_heads"],
        rope_theta=float(require(text, "rope_theta", f"{where}text_config.")),
        mrope_section=list(text.get("mrope_section", [24, 20, 20])),
        num_experts=experts,
        router_aux_loss_coef=coefficient * values["num_experts_per_tok"],
        thinker_hidden_size=require(config, "thinker_hidden_size", where),
        accept_hidden_layer=require(config, "accept_hidden_layer", where),
        projection_intermediate_size=require(text, "intermediate_size", f"{where}text_config."),
        num_code_groups=groups,
        codebook_size=codebook_size,
        codec_vocab_size=codes,
        codec_text_id=free,
        speaker_ids=speakers,
        code_predictor=CodePredictorConfig(
            **{key: require(predictor, key, f"{where}code_predictor_config.") for key in _PREDICTOR},
            rope_theta=float(predictor.get("rope_theta", 10000.0)),
        ),
    )


def talker_to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    """``talker_config`` of a model with a Talker.

    Raises:
        UserError: the format cannot hold this Talker.
    """
    talker = required(model.talker)
    _check(talker)
    predictor = talker.code_predictor
    text = {
        "model_type": TEXT_TYPE,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "num_hidden_layers": len(talker.pattern.replace("|", "")) * talker.repeats // 2,
        "head_dim": talker.head_dim,
        "intermediate_size": talker.projection_intermediate_size,
        "vocab_size": talker.codec_vocab_size,
        "num_experts": talker.num_experts,
        "router_aux_loss_coef": talker.router_aux_loss_coef / talker.num_experts_per_tok,
        "initializer_range": model.initializer_range,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": talker.rope_theta,
            "mrope_section": list(talker.mrope_section),
            "mrope_interleaved": True,
        },
        **{key: getattr(talker, key) for key in _TEXT},
    }
    code_predictor = {
        "model_type": "qwen3_omni_moe_talker_code_predictor",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "vocab_size": talker.codebook_size,
        "num_code_groups": talker.num_code_groups,
        "layer_types": ["full_attention"] * predictor.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": predictor.rope_theta},
        **{key: getattr(predictor, key) for key in _PREDICTOR},
    }
    return {
        "text_config": text,
        "code_predictor_config": code_predictor,
        "num_code_groups": talker.num_code_groups,
        "thinker_hidden_size": talker.thinker_hidden_size,
        "accept_hidden_layer": talker.accept_hidden_layer,
        "speaker_id": dict(talker.speaker_ids),
        **{theirs: getattr(talker, ours) for ours, theirs in _CONTROLS.items()},
    }


def _check(talker: TalkerConfig) -> None:
    """Refuse a Talker that the format cannot hold, the style first: it decides most of the rest."""
    symbols = talker.pattern.replace("|", "") * talker.repeats
    plain = symbols == "*E" * (len(symbols) // 2)
    given = {
        **{key: (getattr(talker, key), value) for key, value in _OURS.items()},
        "pattern": ("*E" if plain else talker.pattern, "*E"),
        "code_predictor.hidden_size": (talker.code_predictor.hidden_size, talker.hidden_size),
        "shared_expert_intermediate_size": (talker.shared_expert_intermediate_size or 0, "above 0"),
    }
    for key, (value, wanted) in given.items():
        if value != wanted and (wanted != "above 0" or value <= 0):
            raise UserError(
                f"model.talker.{key}={value}: must be {wanted} in a Qwen3-Omni; use format=omni_talker for this Talker"
            )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration with the rotary embedding's keys among the others, and nulls left out."""
    flat = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {key: value for key, value in flat.items() if value is not None}
