"""Checks of the Thinker: its layers, and how a layout splits them."""

from __future__ import annotations

from omni_train.networks.encoders import check_audio, check_parts, check_vision
from omni_train.recipe.refusals import divides, refuse, value
from omni_train.recipe.schema import Precision, Recipe, required


def check_thinker(recipe: Recipe) -> None:
    """Refuse a Thinker that cannot be built or split.

    Raises:
        UserError: the first thing found, in one line.
    """
    _sizes(recipe)
    _layout(recipe)
    check_parts(recipe)
    if recipe.model.audio is not None:
        check_audio(recipe)
    if recipe.model.vision is not None:
        check_vision(recipe)
    if recipe.data.row_tokens > (most := required(recipe.model.thinker).max_position_embeddings):
        refuse(recipe, "data.row_tokens", f"longer than model.thinker.max_position_embeddings={most}; shorten the rows")


def _sizes(recipe: Recipe) -> None:
    thinker = required(recipe.model.thinker)
    if foreign := set(thinker.pattern) - set("G*E-|"):
        refuse(recipe, "model.thinker.pattern", f"{min(foreign)!r} is no layer; use G, *, E, - and | between stages")
    if "|" in thinker.pattern and thinker.repeats != 1:
        refuse(
            recipe, "model.thinker.repeats", "a pattern with | is the whole model; write the layers out and repeats=1"
        )
    if "E" in thinker.pattern:
        for key in (
            "model.thinker.num_experts",
            "model.thinker.num_experts_per_tok",
            "model.thinker.moe_intermediate_size",
        ):
            if not value(recipe, key):
                refuse(recipe, key, f"model.thinker.pattern={thinker.pattern} has MoE layers (E); give {key}")
        if thinker.num_experts_per_tok > thinker.num_experts:
            refuse(
                recipe,
                "model.thinker.num_experts_per_tok",
                f"more than model.thinker.num_experts={thinker.num_experts}",
            )
    elif thinker.num_experts:
        refuse(
            recipe, "model.thinker.num_experts", f"model.thinker.pattern={thinker.pattern} has no MoE layer (E); set 0"
        )
    if "-" in thinker.pattern and not thinker.intermediate_size:
        refuse(
            recipe,
            "model.thinker.intermediate_size",
            f"model.thinker.pattern={thinker.pattern} has dense MLPs (-); give their width",
        )
    divides(
        recipe, thinker.num_key_value_heads, "model.thinker.num_key_value_heads", "model.thinker.num_attention_heads"
    )
    if "G" in thinker.pattern:
        for key in ("model.thinker.linear_num_key_heads", "model.thinker.linear_num_value_heads"):
            if not value(recipe, key):
                refuse(
                    recipe, key, f"model.thinker.pattern={thinker.pattern} has Gated DeltaNet layers (G); give {key}"
                )
        divides(
            recipe,
            thinker.linear_num_key_heads,
            "model.thinker.linear_num_key_heads",
            "model.thinker.linear_num_value_heads",
        )
    rotary = thinker.head_dim * thinker.partial_rotary_factor
    if rotary % 2:
        refuse(
            recipe,
            "model.thinker.partial_rotary_factor",
            f"rotates {rotary:g} of model.thinker.head_dim={thinker.head_dim}; must be even",
        )
    if len(thinker.mrope_section) != 3 or sum(thinker.mrope_section) != rotary // 2:
        refuse(
            recipe,
            "model.thinker.mrope_section",
            f"must be 3 numbers (T, H, W) that sum to half the rotary dims, {rotary / 2:g}",
        )


def _layout(recipe: Recipe) -> None:
    """Refuse layouts whose axes do not divide the sizes of the model."""
    thinker, parallel = required(recipe.model.thinker), recipe.parallel
    divides(recipe, parallel.tensor, "parallel.tensor", "model.vocab_size", "model.thinker.num_attention_heads")
    # Megatron gives several tensor ranks one key-value head each where there are fewer heads than ranks.
    if max(parallel.tensor, thinker.num_key_value_heads) % min(parallel.tensor, thinker.num_key_value_heads):
        refuse(
            recipe,
            "parallel.tensor",
            f"neither divides nor is a multiple of model.thinker.num_key_value_heads={thinker.num_key_value_heads}",
        )
    widths = ("model.thinker.intermediate_size", "model.thinker.shared_expert_intermediate_size")
    divides(recipe, parallel.tensor, "parallel.tensor", *widths)
    # Gated DeltaNet turns context ranks into head ranks by an all-to-all, so its heads are split over both.
    heads = ("model.thinker.linear_num_key_heads", "model.thinker.linear_num_value_heads")
    if "G" in thinker.pattern:
        divides(recipe, parallel.tensor * parallel.context, "parallel.tensor·parallel.context", *heads)
    if thinker.num_experts:
        divides(recipe, parallel.expert, "parallel.expert", "model.thinker.num_experts")
        divides(recipe, parallel.expert_tensor, "parallel.expert_tensor", "model.thinker.moe_intermediate_size")
        # The experts' grouped product reads rows of whole 16-byte words.
        word = 8 if recipe.precision is Precision.bf16 else 4
        divides(recipe, word, f"what precision={recipe.precision} needs", "model.thinker.hidden_size")
        divides(
            recipe,
            word * parallel.expert_tensor,
            f"parallel.expert_tensor times what precision={recipe.precision} needs",
            "model.thinker.moe_intermediate_size",
        )
    for key in ("parallel.expert", "parallel.expert_tensor"):
        if value(recipe, key) > 1 and not thinker.num_experts:
            refuse(recipe, key, f"model={recipe.model.name} has no experts; set {key}=1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        refuse(recipe, "parallel.virtual_pipeline", "needs parallel.pipeline of at least 2; set it to 1 or add stages")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if "|" in thinker.pattern:
        if (marked := thinker.pattern.count("|") + 1) != stages:
            refuse(
                recipe,
                "model.thinker.pattern",
                f"marks {marked} stages but parallel.pipeline·virtual_pipeline={stages}",
            )
        if "" in thinker.pattern.split("|"):
            refuse(recipe, "model.thinker.pattern", "has a stage without layers; move the |")
    elif (layers := len(thinker.pattern) * thinker.repeats) % stages:
        refuse(
            recipe,
            "parallel.pipeline",
            f"{layers} layers (model.thinker.pattern×repeats) are not a multiple of "
            f"pipeline·virtual_pipeline={stages}; "
            "choose a divisor or mark the stages with | in model.thinker.pattern",
        )
    for key in ("parallel.pipeline", "parallel.context"):
        if recipe.evaluation.every and value(recipe, key) > 1:
            refuse(
                recipe, key, f"evaluation.every={recipe.evaluation.every} generates, which needs 1; set one of the two"
            )
