"""Correspondence of our tensors with Qwen3.5's, MoE and dense, and with Qwen3-Omni's Thinker's.

Layer i of their language models is two of ours: 2i, attention or Gated DeltaNet, and 2i + 1, MoE or dense MLP. Norms
are zero-centred in both formats, or plain in both. Nothing is added, scaled or transposed: import and export read this
one table in opposite directions.
"""

from __future__ import annotations

from collections.abc import Collection

from omni_train.interop.encoder_tensors import audio_map, vision_map
from omni_train.interop.families import Names
from omni_train.interop.rows import Rows, TensorMap
from omni_train.recipe.schema import ModelConfig, StackConfig


def tensor_map(model: ModelConfig, names: Names, tensors: Collection[str] = ()) -> TensorMap:
    """Tensor map of a whole model: each tensor of our checkpoints, and the rows of the folder's that it consists of.

    Args:
        model: our configuration.
        names: names of the folder's parts.
        tensors: names of the folder's tensors, which tell whether experts are stacked or one by one; without any they
            are as ``save_pretrained`` writes them.
    """
    thinker = model.thinker
    table: TensorMap = {
        "embedding.word_embeddings.weight": [Rows(f"{names.text}embed_tokens.weight")],
        "final_norm.weight": [Rows(f"{names.text}norm.weight")],
    }
    if not thinker.tie_word_embeddings:
        table["output_layer.weight"] = [Rows(f"{names.head}weight")]
    pattern = thinker.pattern.replace("|", "") * thinker.repeats
    for i, symbol in enumerate(pattern):
        theirs = f"{names.text}layers.{i // 2}."
        table |= layer_map(thinker, symbol, f"decoder.layers.{i}.", theirs, tensors)
    if thinker.mtp_num_hidden_layers:
        theirs = "mtp.layers.0."
        table |= {
            "mtp.embedding_norm.weight": [Rows("mtp.pre_fc_norm_embedding.weight")],
            "mtp.hidden_norm.weight": [Rows("mtp.pre_fc_norm_hidden.weight")],
            "mtp.projection.weight": [Rows("mtp.fc.weight")],  # columns of the embedding, then of the hidden state
            "mtp.final_norm.weight": [Rows("mtp.norm.weight")],
        }
        for i, symbol in enumerate("*" + pattern[1]):
            table |= layer_map(thinker, symbol, f"mtp.decoder.layers.{i}.", theirs, tensors)
    if model.audio:
        table |= audio_map(model.audio, names.audio)
    if model.vision:
        table |= vision_map(model.vision, names)
    return table


def layer_map(stack: StackConfig, symbol: str, ours: str, theirs: str, tensors: Collection[str]) -> TensorMap:
    """Tensor map of one of our layers.

    Args:
        stack: the layers' sizes.
        symbol: kind of the layer, of the stack's pattern.
        ours, theirs: prefixes of its names.
        tensors: names of the folder's tensors, as of :func:`tensor_map`.
    """
    if symbol == "G":
        table = _gated_delta_net(stack)
    elif symbol == "*":
        table = _attention(stack)
    elif symbol == "E":
        table = _mixture_of_experts(stack, f"{theirs}mlp.experts.gate_up_proj" in tensors)
    else:
        table = _dense_mlp(stack)
    return {ours + key: [Rows(theirs + r.name, r.start, r.stop) for r in rows] for key, rows in table.items()}


def _attention(stack: StackConfig) -> TensorMap:
    """Tensor map of attention. Ours is ordered by key/value head: queries, gates, key, value; their q_proj by head.

    Each head's gate follows its query in their q_proj. Without an output gate there are no gates in either.
    """
    heads, groups, width = stack.num_attention_heads, stack.num_key_value_heads, stack.head_dim

    def head(name: str, index: int) -> Rows:
        return Rows(f"self_attn.{name}_proj.weight", index * width, (index + 1) * width)

    qkv = []
    for group in range(groups):
        mine = range(group * heads // groups, (group + 1) * heads // groups)
        each = 2 if stack.attention_output_gate else 1
        qkv += [head("q", each * i) for i in mine]  # queries
        if stack.attention_output_gate:
            qkv += [head("q", each * i + 1) for i in mine]
        qkv += [head("k", group), head("v", group)]
    return {
        "input_layernorm.weight": [Rows("input_layernorm.weight")],
        "self_attention.linear_qkv.weight": qkv,
        "self_attention.q_layernorm.weight": [Rows("self_attn.q_norm.weight")],
        "self_attention.k_layernorm.weight": [Rows("self_attn.k_norm.weight")],
        "self_attention.linear_proj.weight": [Rows("self_attn.o_proj.weight")],
    }


def _gated_delta_net(stack: StackConfig) -> TensorMap:
    """Tensor map of Gated DeltaNet. Our checkpoints keep the six parts of `in_proj` under names of their own."""
    k = stack.linear_num_key_heads * stack.linear_key_head_dim
    v = stack.linear_num_value_heads * stack.linear_value_head_dim
    return {
        "input_layernorm.weight": [Rows("input_layernorm.weight")],
        "self_attention.in_proj.weight.query": [Rows("linear_attn.in_proj_qkv.weight", 0, k)],
        "self_attention.in_proj.weight.key": [Rows("linear_attn.in_proj_qkv.weight", k, 2 * k)],
        "self_attention.in_proj.weight.value": [Rows("linear_attn.in_proj_qkv.weight", 2 * k, 2 * k + v)],
        "self_attention.in_proj.weight.z": [Rows("linear_attn.in_proj_z.weight")],
        "self_attention.in_proj.weight.beta": [Rows("linear_attn.in_proj_b.weight")],
        "self_attention.in_proj.weight.alpha": [Rows("linear_attn.in_proj_a.weight")],
        "self_attention.conv1d.weight.query": [Rows("linear_attn.conv1d.weight", 0, k)],
        "self_attention.conv1d.weight.key": [Rows("linear_attn.conv1d.weight", k, 2 * k)],
        "self_attention.conv1d.weight.value": [Rows("linear_attn.conv1d.weight", 2 * k, 2 * k + v)],
        "self_attention.A_log": [Rows("linear_attn.A_log")],
        "self_attention.dt_bias": [Rows("linear_attn.dt_bias")],
        "self_attention.out_norm.weight": [Rows("linear_attn.norm.weight")],
        "self_attention.out_proj.weight": [Rows("linear_attn.out_proj.weight")],
    }


def _mixture_of_experts(stack: StackConfig, stacked: bool) -> TensorMap:
    experts, hidden, width = stack.num_experts, stack.hidden_size, stack.moe_intermediate_size
    if stacked:
        fc1, fc2 = [Rows("mlp.experts.gate_up_proj")], [Rows("mlp.experts.down_proj")]
    else:
        fc1 = [Rows(f"mlp.experts.{i}.{name}_proj.weight", 0, width) for i in range(experts) for name in ("gate", "up")]
        fc2 = [Rows(f"mlp.experts.{i}.down_proj.weight", 0, hidden) for i in range(experts)]
    table = {
        "pre_mlp_layernorm.weight": [Rows("post_attention_layernorm.weight")],
        "mlp.router.weight": [Rows("mlp.gate.weight")],
        "mlp.router.load": [],  # of the last batch, for the balancing loss: only training knows it
        "mlp.experts.linear_fc1.weight": fc1,
        "mlp.experts.linear_fc2.weight": fc2,
    }
    if stack.shared_expert_intermediate_size:
        table |= {
            "mlp.shared_experts.linear_fc1.weight": gate_up("mlp.shared_expert", stack.shared_expert_intermediate_size),
            "mlp.shared_experts.linear_fc2.weight": [Rows("mlp.shared_expert.down_proj.weight")],
            "mlp.shared_experts.gate_weight": [Rows("mlp.shared_expert_gate.weight")],
        }
    return table


def _dense_mlp(stack: StackConfig) -> TensorMap:
    return {
        "pre_mlp_layernorm.weight": [Rows("post_attention_layernorm.weight")],
        "mlp.linear_fc1.weight": gate_up("mlp", stack.intermediate_size),
        "mlp.linear_fc2.weight": [Rows("mlp.down_proj.weight")],
    }


def gate_up(module: str, width: int) -> list[Rows]:
    """Rows of a fused projection of an MLP, `width` rows of the gate and as many of what it gates."""
    return [Rows(f"{module}.gate_proj.weight", 0, width), Rows(f"{module}.up_proj.weight", 0, width)]
