"""FLOPs of a training step of the Thinker, for TFLOP/s and model FLOPs utilisation.

A multiply and an add count as two. The backward pass costs twice the forward; what recomputation repeats is not
counted, since it is no progress. Frozen parts are counted like the others. Attention counts the causal half, by
sequence; the gated delta rule counts its recurrent definition, not what a chunked kernel spends.
"""

from __future__ import annotations

from collections.abc import Sequence

from omni_train.data.rows.batch import PackedBatch
from omni_train.data.samples.lengths import audio_tokens, convolved, window_tokens
from omni_train.recipe.schema import ModelConfig, StackConfig


def stack_flops(stack: StackConfig) -> float:
    """Forward FLOPs of one token in a stack's layers, without attention scores, which depend on the sequence."""
    cost = _layer_flops(stack)
    return float(sum(cost[layer] for layer in stack.pattern * stack.repeats))


def attention_flops(stack: StackConfig, lengths: Sequence[int], more_layers: int = 0) -> float:
    """Forward FLOPs of the attention scores and sums of a stack over sequences of these lengths."""
    layers = (stack.pattern * stack.repeats).count("*") + more_layers
    width = stack.num_attention_heads * stack.head_dim
    # Position t meets t + 1 keys, in the scores and in the weighted sum.
    return layers * sum(4 * width * length * (length + 1) / 2 for length in lengths)


def flops_per_token(model: ModelConfig) -> float:
    """Forward FLOPs of one token in the Thinker, without attention scores."""
    thinker = model.thinker
    cost, head = _layer_flops(thinker), 2 * thinker.hidden_size * model.vocab_size
    block = cost["*"] + cost["E" if thinker.num_experts else "-"]
    mtp = thinker.mtp_num_hidden_layers * (4 * thinker.hidden_size**2 + block + head)
    return stack_flops(thinker) + float(head + mtp)


def _layer_flops(stack: StackConfig) -> dict[str, float]:
    """Forward FLOPs of one token in each kind of layer."""
    hidden = stack.hidden_size
    query, kv = stack.num_attention_heads * stack.head_dim, stack.num_key_value_heads * stack.head_dim
    key = stack.linear_num_key_heads * stack.linear_key_head_dim
    value = stack.linear_num_value_heads * stack.linear_value_head_dim
    gates = query if stack.attention_output_gate else 0
    attention = 2 * hidden * (query + gates + 2 * kv) + 2 * query * hidden
    projections = 2 * hidden * (2 * key + 2 * value + 2 * stack.linear_num_value_heads) + 2 * value * hidden
    convolution = 2 * stack.linear_conv_kernel_dim * (2 * key + value)
    # Per value head: decay the state, read it with k, write the correction, read it with q.
    recurrence = 7 * stack.linear_num_value_heads * stack.linear_key_head_dim * stack.linear_value_head_dim
    moe = (
        2 * hidden * stack.num_experts
        + stack.num_experts_per_tok * 6 * hidden * stack.moe_intermediate_size
        + 6 * hidden * stack.shared_expert_intermediate_size
        + (2 * hidden if stack.shared_expert_intermediate_size else 0)
    )
    return {
        "*": attention,
        "G": projections + convolution + recurrence,
        "E": moe,
        "-": 6 * hidden * stack.intermediate_size,
        "|": 0,
    }


def audio_flops(model: ModelConfig, clips: list[int]) -> float:
    """Forward FLOPs of the audio encoder and its adapter, in the windows of evaluation.

    Args:
        model: with an audio encoder.
        clips: mel frames of each clip.
    """
    thinker, audio, total = model.thinker, model.audio, 0.0
    width, channels = audio.hidden_size, audio.conv_channels
    layer = 8 * width * width + 4 * width * audio.intermediate_size
    last_bins = convolved(audio.num_mel_bins, audio.num_convolutions)
    for frames in clips:
        for depth in range(1, audio.num_convolutions + 1):
            positions = convolved(frames, depth) * convolved(audio.num_mel_bins, depth)
            total += 2 * 9 * (1 if depth == 1 else channels) * channels * positions
        tokens = audio_tokens(frames, audio)
        window = min(window_tokens(audio.eval_window_frames, audio) or tokens, tokens)
        projections = 2 * channels * last_bins * width + 2 * width * width + 2 * width * thinker.hidden_size
        total += tokens * (projections + audio.num_hidden_layers * (layer + 4 * width * window))
    return total


def vision_flops(model: ModelConfig, grids: list[list[int]]) -> float:
    """Forward FLOPs of the vision encoder and its mergers.

    Args:
        model: with a vision encoder.
        grids: patches (t, h, w) of each image or video.
    """
    thinker, vision, total = model.thinker, model.vision, 0.0
    width, merged = vision.hidden_size, vision.spatial_merge_size**2
    layer = 8 * width * width + 4 * width * vision.intermediate_size
    patch = 2 * 3 * vision.temporal_patch_size * vision.patch_size**2 * width
    merger = 2 * merged * width * (merged * width + thinker.hidden_size) / merged
    for t, h, w in grids:
        attention = 4 * width * h * w
        each = patch + vision.depth * (layer + attention) + (1 + len(vision.deepstack_visual_indexes)) * merger
        total += t * h * w * each
    return total


def step_flops(model: ModelConfig, rows: Sequence[PackedBatch]) -> float:
    """FLOPs of forward and backward of one training step over packed rows, padding excluded."""
    thinker, per_token = model.thinker, flops_per_token(model)
    total = 0.0
    for row in rows:
        real = (~row.padding).cumsum(0).tolist()
        ends = [int(end) for end in row.cu_seqlens[1:]]
        counts = [real[end - 1] for end in ends]
        lengths = [after - before for before, after in zip([0, *counts[:-1]], counts, strict=True)]
        total += counts[-1] * per_token
        if model.audio:
            total += audio_flops(model, row.mel_cu_seqlens.diff().tolist())
        if model.vision:
            total += vision_flops(model, row.grid_thw.tolist())
        total += attention_flops(thinker, lengths, thinker.mtp_num_hidden_layers)
    return 3.0 * total
