"""Formats of ``omni-train convert``: names of each family's parts, and what all of its models have in common."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Names:
    """Prefixes of a folder's tensor names by part, and names of a vision adapter's three modules."""

    text: str
    head: str
    vision: str
    audio: str | None = None
    merger: tuple[str, str, str] = ("norm", "linear_fc1", "linear_fc2")
    deepstack: str | None = None  # name of the list of DeepStack's mergers


@dataclass(frozen=True)
class Family:
    """Family of models in transformers.

    The ``config.json`` of a whole model has a part for the language model and one for each encoder. Some families also
    have a language model alone, whose ``config.json`` is flat.
    """

    model_type: str
    architecture: str
    names: Names
    text_type: str  # model_type of the language model
    mixers: str  # symbols of its token mixers, each of which `feed_forward` follows
    feed_forward: str
    sizes: tuple[str, ...]  # keys of its language model that not every family has
    defaults: Mapping[str, Any]  # values of keys that may be missing in the language model's part
    fixed: Mapping[str, Any]  # values of our ThinkerConfig that all of its models have
    text_architecture: str | None = None  # architecture of a language model alone
    text_names: Names | None = None
    thinker: str | None = None  # key of config.json that holds everything but the Talker
    config_extras: Mapping[str, Any] = field(
        default_factory=dict
    )  # keys of a config.json that is not made from another

    def whole(self, tensors: Collection[str], encoders: bool) -> bool:
        """Whether a folder with these tensors is of a whole model, rather than of a language model alone."""
        return encoders or not self.text_names or any(name.startswith(self.names.text) for name in tensors)

    def carries(self, tensor: str) -> bool:
        """Whether a tensor is of a part that has no model here, and is carried along unread."""
        return self.thinker is not None and not tensor.startswith("thinker.")


_QWEN3_5 = dict(
    names=Names(text="model.language_model.", head="lm_head.", vision="model.visual."),
    text_names=Names(text="model.", head="lm_head.", vision="model.visual."),
    mixers="G*",
    defaults={"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10], "full_attention_interval": 4},
    fixed={"attention_output_gate": True, "zero_centered_norm": True},
)
_DELTA_NET = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")

FAMILIES = {
    "qwen3_5_moe": Family(
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        text_type="qwen3_5_moe_text",
        text_architecture="Qwen3_5MoeForCausalLM",
        feed_forward="E",
        sizes=(*_DELTA_NET, *_EXPERTS, "shared_expert_intermediate_size"),
        **_QWEN3_5,
    ),
    "qwen3_5": Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        text_type="qwen3_5_text",
        text_architecture="Qwen3_5ForCausalLM",
        feed_forward="-",
        sizes=(*_DELTA_NET, "intermediate_size"),
        **_QWEN3_5,
    ),
    "qwen3_omni_moe": Family(
        "qwen3_omni_moe",
        "Qwen3OmniMoeForConditionalGeneration",
        names=Names(
            text="thinker.model.",
            head="thinker.lm_head.",
            vision="thinker.visual.",
            audio="thinker.audio_tower.",
            merger=("ln_q", "mlp.0", "mlp.2"),
            deepstack="merger_list",
        ),
        text_type="qwen3_omni_moe_text",
        mixers="*",
        feed_forward="E",
        sizes=_EXPERTS,
        defaults={"partial_rotary_factor": 1.0, "mrope_section": [24, 20, 20], "full_attention_interval": 1},
        fixed={
            "attention_output_gate": False,
            "zero_centered_norm": False,
            "partial_rotary_factor": 1.0,
            "shared_expert_intermediate_size": 0,
            "mtp_num_hidden_layers": 0,
        },
        thinker="thinker_config",
        config_extras={  # without a Talker; ids of the released tokenizer
            "enable_audio_output": False,
            "thinker_config": {
                "model_type": "qwen3_omni_moe_thinker",
                "audio_start_token_id": 151669,
                "audio_end_token_id": 151670,
                "audio_token_id": 151675,
                "image_token_id": 151655,
                "video_token_id": 151656,
                "vision_start_token_id": 151652,
                "vision_end_token_id": 151653,
                "position_id_per_seconds": 13,
                "seconds_per_chunk": 2,
            },
        },
    ),
}
