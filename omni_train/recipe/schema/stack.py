"""The stack of layers that Thinker and Talker have in common. Keys have the names of the published configurations."""

from __future__ import annotations

from dataclasses import dataclass

from omni_train.recipe.keys import Change, key


@dataclass
class StackConfig:
    """A decoder-only stack of layers: Qwen3.5's hybrid MoE, its dense sibling, or Qwen3-Omni's."""

    hidden_size: int = key(ge=1, help="width")
    # `|` may mark pipeline (and virtual pipeline) stage ends when repeats is 1; without it the stages are cut evenly.
    pattern: str = key(
        "GEGEGE*E",
        not_empty=True,
        help="layers of a block: `G` Gated DeltaNet, `*` gated attention, `E` MoE, `-` dense MLP; `|` between stages",
    )
    repeats: int = key(ge=1, help="how many times the pattern is written; 1 where it has |")
    num_attention_heads: int = key(ge=1, help="query heads; a multiple of num_key_value_heads")
    num_key_value_heads: int = key(ge=1, help="key-value heads")
    head_dim: int = key(256, ge=1, help="width of a head")
    partial_rotary_factor: float = key(0.25, gt=0, le=1, help="part of a head that rotates with positions")
    rope_theta: float = key(1.0e7, gt=0, help="base of the rotary frequencies")
    mrope_section: list[int] = key(
        [11, 11, 10], ge=0, help="pairs that rotate with time, height and width; they sum to half the rotary dims"
    )
    linear_num_key_heads: int = key(0, ge=0, help="key heads of Gated DeltaNet (G); 0 where the pattern has none")
    linear_num_value_heads: int = key(0, ge=0, help="its value heads, a multiple of the key heads")
    linear_key_head_dim: int = key(128, ge=1, help="width of its key heads")
    linear_value_head_dim: int = key(128, ge=1, help="width of its value heads")
    linear_conv_kernel_dim: int = key(4, ge=1, help="positions that its convolution sees")
    intermediate_size: int = key(0, ge=0, help="width of a dense MLP (-); 0 where the pattern has none")
    num_experts: int = key(0, ge=0, help="experts of a MoE layer (E); 0 where the pattern has none")
    num_experts_per_tok: int = key(0, ge=0, help="experts that each token is given to")
    moe_intermediate_size: int = key(0, ge=0, help="width of an expert")
    shared_expert_intermediate_size: int = key(0, ge=0, help="width of the shared expert; 0: there is none")
    # Megatron's normalisation: the auxiliary loss is 1 at perfect balance (transformers' is top_k there).
    router_aux_loss_coef: float = key(
        1.0e-3, ge=0, resume=Change.learned, help="weight of the load-balancing loss, which is 1 at perfect balance"
    )
    rms_norm_eps: float = key(1.0e-6, gt=0, help="epsilon of the norms")
    max_position_embeddings: int = key(262144, ge=1, resume=Change.free, help="tokens of the longest row")
    attention_output_gate: bool = key(True, help="attention has an output gate; Qwen3-Omni has none")
    zero_centered_norm: bool = key(True, help="norms are y = x̂·(1+w); Qwen3-Omni's are plain")
