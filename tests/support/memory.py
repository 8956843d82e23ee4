"""How much of a GPU a recipe needs, by arithmetic: what the table of layouts in docs/recipes.md says.

No measurement. Counted are weights, gradients and optimizer state; what is kept for the backward pass, of as many
micro-batches as a pipeline stage holds at once; what one block needs while it is recomputed and differentiated; the
loss; and 4 GiB for NCCL, the allocator and the kernels' workspaces. An H100 has 79.6 GiB.
"""

from __future__ import annotations

from omni_train.models.config import split_pattern
from omni_train.recipe.schema import ModelConfig, Recipe, Recompute

_KEPT = {"G": 156_000, "*": 77_000, "E": 75_000}  # bytes a token of a layer 2,048 wide, bf16, flash_35b_a3b's shape
_ROUTER_KEPT = 8_000  # of an MoE layer that is recomputed
_IMBALANCE = 1.5  # rows of the fullest expert rank against the mean
_AUDIO, _VISION = 0.55, 0.35  # of a row's tokens, as the blends of S2 and S3 have them at most, to two digits
_OTHER = 4 * 2**30


def gibibytes(recipe: Recipe, gpus: int) -> float:
    """Of the fullest rank of this many."""
    return max(_of_stage(recipe, gpus, stage) for stage in range(recipe.parallel.pipeline)) / 2**30


def _of_stage(recipe: Recipe, gpus: int, stage: int) -> float:
    model, parallel = recipe.model, recipe.parallel
    layers = split_pattern(model.thinker, parallel)[stage]
    first, last = stage == 0, stage == parallel.pipeline - 1
    in_flight = parallel.pipeline - stage

    dense = sum(_dense_parameters(model, layer) for layer in layers)
    experts = layers.count("E") * _expert_parameters(model)
    table = model.vocab_size * model.thinker.hidden_size
    encoders = 12 * (
        model.audio.num_hidden_layers * model.audio.hidden_size**2 + model.vision.depth * model.vision.hidden_size**2
    )
    dense += table * (first + last)
    if last:  # multi-token prediction, with an embedding of its own where the first stage is another
        dense += (
            sum(_dense_parameters(model, layer) for layer in "*E")
            + 2 * model.thinker.hidden_size**2
            + table * (not first)
        )
        experts += _expert_parameters(model)
    trained = recipe.trainable == ["*"]  # S1 trains an adapter or an encoder, and keeps of the rest the weights alone
    data_ranks = gpus // (parallel.tensor * parallel.pipeline)
    expert_data_ranks = gpus // (parallel.expert * parallel.expert_tensor * parallel.pipeline)
    states = dense / parallel.tensor * (6 + 12 / data_ranks if trained else 2)
    states += experts / (parallel.expert * parallel.expert_tensor) * (6 + 12 / expert_data_ranks if trained else 2)
    states += first * encoders / parallel.tensor * (6 + 12 / data_ranks)

    row = recipe.data.row_tokens / parallel.context  # an encoder's, whose tokens tensor ranks do not share
    tokens = row / parallel.tensor
    width = model.thinker.hidden_size / 2048
    full = recipe.recompute is Recompute.full
    if full:
        kept = 2 * model.thinker.hidden_size * len(layers)
    else:
        kept = width * sum(_ROUTER_KEPT if layer == "E" else _KEPT[layer] for layer in layers)
    moe = width * _KEPT["E"] * _IMBALANCE
    block = 2 * (moe + (width * _KEPT["G"] if full else 0))  # values and their gradients
    of_prediction = width * _KEPT["*"] + moe if last else 0
    loss = last * 3 * 4 * recipe.loss_chunk_tokens * model.vocab_size / parallel.tensor
    seen = first * in_flight * row * _encoders_kept(recipe, full)
    return states + tokens * (in_flight * kept + block + of_prediction) + seen + loss + _OTHER


def _dense_parameters(model: ModelConfig, layer: str) -> int:
    hidden = model.thinker.hidden_size
    if layer == "G":
        keys = model.thinker.linear_num_key_heads * model.thinker.linear_key_head_dim
        values = model.thinker.linear_num_value_heads * model.thinker.linear_value_head_dim
        return hidden * (2 * keys + 3 * values + 2 * model.thinker.linear_num_value_heads)
    if layer == "*":
        return (
            hidden
            * model.thinker.head_dim
            * (3 * model.thinker.num_attention_heads + 2 * model.thinker.num_key_value_heads)
        )
    return hidden * (model.thinker.num_experts + 3 * model.thinker.shared_expert_intermediate_size)


def _expert_parameters(model: ModelConfig) -> int:
    return 3 * model.thinker.hidden_size * model.thinker.moe_intermediate_size * model.thinker.num_experts


def _encoders_kept(recipe: Recipe, full: bool) -> float:
    """Bytes a token of the row: the input of each layer, or a Transformer's layer whole (Korthikanti and others,
    arXiv:2205.05198, section 4.2.1, without the attention matrix)."""
    audio, vision = recipe.model.audio, recipe.model.vision
    each = 2 if full else 10 + 24 / recipe.parallel.tensor
    of_sound = audio.num_hidden_layers * audio.hidden_size * each
    of_sight = vision.depth * vision.hidden_size * vision.spatial_merge_size**2 * each
    if recipe.trainable == ["*"]:
        return _AUDIO * of_sound + _VISION * of_sight
    return (
        of_sight if "vision_encoder.*" in recipe.trainable else of_sound if "audio_encoder.*" in recipe.trainable else 0
    )
