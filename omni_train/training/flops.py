"""Exact operation counts of a training step, for TFLOP/s and model FLOPs utilisation.

A multiply and an add count as two. The backward pass costs twice the forward; what recomputation repeats is not
counted, since it is no progress. Attention counts the causal half, by sequence; the gated delta rule counts its
recurrent definition, not what a chunked kernel spends.
"""

from __future__ import annotations

from omni_train.data.batch import PackedBatch
from omni_train.recipe.schema import ModelConfig


def flops_per_token(model: ModelConfig) -> float:
    """Forward operations of one token in everything whose cost does not depend on the sequence's length."""
    hidden = model.hidden_size
    query, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    key = model.linear_num_key_heads * model.linear_key_head_dim
    value = model.linear_num_value_heads * model.linear_value_head_dim
    attention = 2 * hidden * (2 * query + 2 * kv) + 2 * query * hidden
    projections = 2 * hidden * (2 * key + 2 * value + 2 * model.linear_num_value_heads) + 2 * value * hidden
    convolution = 2 * model.linear_conv_kernel_dim * (2 * key + value)
    # Per value head: decay the state, read it with k, write the correction, read it with q.
    recurrence = 7 * model.linear_num_value_heads * model.linear_key_head_dim * model.linear_value_head_dim
    moe = (
        2 * hidden * model.num_experts
        + model.num_experts_per_tok * 6 * hidden * model.moe_intermediate_size
        + 6 * hidden * model.shared_expert_intermediate_size
        + (2 * hidden if model.shared_expert_intermediate_size else 0)
    )
    cost = {
        "*": attention,
        "G": projections + convolution + recurrence,
        "E": moe,
        "-": 6 * hidden * model.intermediate_size,
        "|": 0,
    }
    layers = model.pattern * model.repeats
    head = 2 * hidden * model.vocab_size
    mtp = model.mtp_num_hidden_layers * (
        4 * hidden * hidden + attention + cost["E" if model.num_experts else "-"] + head
    )
    return float(sum(cost[layer] for layer in layers) + head + mtp)


def step_flops(model: ModelConfig, rows: list[PackedBatch]) -> float:
    """Operations of forward and backward over `rows`, padding excluded."""
    per_token = flops_per_token(model)
    attention_layers = (model.pattern * model.repeats).count("*") + model.mtp_num_hidden_layers
    width = model.num_attention_heads * model.head_dim
    total = 0.0
    for row in rows:
        real = (~row.padding).cumsum(0).tolist()
        ends = [int(end) for end in row.cu_seqlens[1:]]
        counts = [real[end - 1] for end in ends]
        lengths = [after - before for before, after in zip([0, *counts[:-1]], counts, strict=True)]
        total += counts[-1] * per_token
        # Position t meets t + 1 keys, in the scores and in the weighted sum.
        total += attention_layers * sum(4 * width * length * (length + 1) / 2 for length in lengths)
    return 3.0 * total
