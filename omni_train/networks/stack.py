"""Checks of a decoder-only stack, the Thinker's or the Talker's: its layers, and how a layout splits them."""

from __future__ import annotations

from omni_train.recipe.refusals import divides, refuse, value
from omni_train.recipe.schema import Precision, Recipe, StackConfig


def check_stack(recipe: Recipe, part: str) -> None:
    """Refuse a stack that cannot be built or split.

    Args:
        recipe: a composed recipe.
        part: `model.thinker` or `model.talker`.

    Raises:
        UserError: the first thing found, in one line.
    """
    _sizes(recipe, part)
    _layout(recipe, part)


def _stack(recipe: Recipe, part: str) -> StackConfig:
    return value(recipe, part)


def _sizes(recipe: Recipe, part: str) -> None:
    stack = _stack(recipe, part)
    if foreign := set(stack.pattern) - set("G*E-|"):
        refuse(recipe, f"{part}.pattern", f"{min(foreign)!r} is no layer; use G, *, E, - and | between stages")
    if "|" in stack.pattern and stack.repeats != 1:
        refuse(recipe, f"{part}.repeats", "a pattern with | is the whole model; write the layers out and repeats=1")
    if "E" in stack.pattern:
        for key in (
            f"{part}.num_experts",
            f"{part}.num_experts_per_tok",
            f"{part}.moe_intermediate_size",
        ):
            if not value(recipe, key):
                refuse(recipe, key, f"{part}.pattern={stack.pattern} has MoE layers (E); give {key}")
        if stack.num_experts_per_tok > stack.num_experts:
            refuse(
                recipe,
                f"{part}.num_experts_per_tok",
                f"more than {part}.num_experts={stack.num_experts}",
            )
    elif stack.num_experts:
        refuse(recipe, f"{part}.num_experts", f"{part}.pattern={stack.pattern} has no MoE layer (E); set 0")
    if "-" in stack.pattern and not stack.intermediate_size:
        refuse(
            recipe,
            f"{part}.intermediate_size",
            f"{part}.pattern={stack.pattern} has dense MLPs (-); give their width",
        )
    divides(recipe, stack.num_key_value_heads, f"{part}.num_key_value_heads", f"{part}.num_attention_heads")
    if "G" in stack.pattern:
        for key in (f"{part}.linear_num_key_heads", f"{part}.linear_num_value_heads"):
            if not value(recipe, key):
                refuse(recipe, key, f"{part}.pattern={stack.pattern} has Gated DeltaNet layers (G); give {key}")
        divides(
            recipe,
            stack.linear_num_key_heads,
            f"{part}.linear_num_key_heads",
            f"{part}.linear_num_value_heads",
        )
    rotary = stack.head_dim * stack.partial_rotary_factor
    if rotary % 2:
        refuse(
            recipe,
            f"{part}.partial_rotary_factor",
            f"rotates {rotary:g} of {part}.head_dim={stack.head_dim}; must be even",
        )
    if len(stack.mrope_section) != 3 or sum(stack.mrope_section) != rotary // 2:
        refuse(
            recipe,
            f"{part}.mrope_section",
            f"must be 3 numbers (T, H, W) that sum to half the rotary dims, {rotary / 2:g}",
        )


def _layout(recipe: Recipe, part: str) -> None:
    """Refuse layouts whose axes do not divide the sizes of the model."""
    stack, parallel = _stack(recipe, part), recipe.parallel
    divides(recipe, parallel.tensor, "parallel.tensor", "model.vocab_size", f"{part}.num_attention_heads")
    # Megatron gives several tensor ranks one key-value head each where there are fewer heads than ranks.
    if max(parallel.tensor, stack.num_key_value_heads) % min(parallel.tensor, stack.num_key_value_heads):
        refuse(
            recipe,
            "parallel.tensor",
            f"neither divides nor is a multiple of {part}.num_key_value_heads={stack.num_key_value_heads}",
        )
    widths = (f"{part}.intermediate_size", f"{part}.shared_expert_intermediate_size")
    divides(recipe, parallel.tensor, "parallel.tensor", *widths)
    # Gated DeltaNet turns context ranks into head ranks by an all-to-all, so its heads are split over both.
    heads = (f"{part}.linear_num_key_heads", f"{part}.linear_num_value_heads")
    if "G" in stack.pattern:
        divides(recipe, parallel.tensor * parallel.context, "parallel.tensor·parallel.context", *heads)
    if stack.num_experts:
        divides(recipe, parallel.expert, "parallel.expert", f"{part}.num_experts")
        divides(recipe, parallel.expert_tensor, "parallel.expert_tensor", f"{part}.moe_intermediate_size")
        # The experts' grouped product reads rows of whole 16-byte words.
        word = 8 if recipe.precision is Precision.bf16 else 4
        divides(recipe, word, f"what precision={recipe.precision} needs", f"{part}.hidden_size")
        divides(
            recipe,
            word * parallel.expert_tensor,
            f"parallel.expert_tensor times what precision={recipe.precision} needs",
            f"{part}.moe_intermediate_size",
        )
    for key in ("parallel.expert", "parallel.expert_tensor"):
        if value(recipe, key) > 1 and not stack.num_experts:
            refuse(recipe, key, f"model={recipe.model.name} has no experts; set {key}=1")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        refuse(recipe, "parallel.virtual_pipeline", "needs parallel.pipeline of at least 2; set it to 1 or add stages")
    stages = parallel.pipeline * parallel.virtual_pipeline
    if "|" in stack.pattern:
        if (marked := stack.pattern.count("|") + 1) != stages:
            refuse(
                recipe,
                f"{part}.pattern",
                f"marks {marked} stages but parallel.pipeline·virtual_pipeline={stages}",
            )
        if "" in stack.pattern.split("|"):
            refuse(recipe, f"{part}.pattern", "has a stage without layers; move the |")
    elif (layers := len(stack.pattern) * stack.repeats) % stages:
        refuse(
            recipe,
            "parallel.pipeline",
            f"{layers} layers ({part}.pattern×repeats) are not a multiple of "
            f"pipeline·virtual_pipeline={stages}; "
            f"choose a divisor or mark the stages with | in {part}.pattern",
        )
    for key in ("parallel.pipeline", "parallel.context"):
        if recipe.evaluation.every and value(recipe, key) > 1:
            refuse(
                recipe, key, f"evaluation.every={recipe.evaluation.every} generates, which needs 1; set one of the two"
            )
