"""Correspondence of our Talker's tensors with Qwen3-Omni's, and with those of a folder of our own names."""

from __future__ import annotations

from collections.abc import Collection

from omni_train.interop.rows import Rows, TensorMap
from omni_train.interop.tensors import gate_up, layer_map
from omni_train.recipe.schema import TalkerConfig

TALKER = "talker."
TEXT_TABLE = "embedding.word_embeddings.weight"
"""Our Talker's table of the text, which in a Qwen3-Omni is the Thinker's."""
_THINKERS_TABLE = "thinker.model.embed_tokens.weight"


def of_talker(tensor: str) -> bool:
    """Whether a tensor of a Qwen3-Omni's folder is one of our Talker's."""
    return tensor.startswith(TALKER) or tensor == _THINKERS_TABLE


def talker_map(talker: TalkerConfig, tensors: Collection[str] = ()) -> TensorMap:
    """Tensor map of a Talker in a Qwen3-Omni's folder, with the Thinker's table of the text.

    Args:
        talker: our configuration.
        tensors: names of the folder's tensors, as of :func:`omni_train.interop.tensors.tensor_map`.
    """
    table: TensorMap = {
        TEXT_TABLE: [Rows(_THINKERS_TABLE)],
        "codec_embedding.weight": [Rows("talker.model.codec_embedding.weight")],
        "codec_head.weight": [Rows("talker.codec_head.weight")],
        "final_norm.weight": [Rows("talker.model.norm.weight")],
    }
    for projection in ("text_projection", "hidden_projection"):
        for name in ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias"):
            table[f"{projection}.{name}"] = [Rows(f"{TALKER}{projection}.{name}")]
    for i, symbol in enumerate(talker.pattern.replace("|", "") * talker.repeats):
        table |= layer_map(talker, symbol, f"decoder.layers.{i}.", f"talker.model.layers.{i // 2}.", tensors)
    return table | _code_predictor(talker)


def own_map(talker: TalkerConfig) -> TensorMap:
    """Tensor map of a Talker of any kind in a folder that has our names."""
    table = {name: [Rows(name)] if parts else [] for name, parts in talker_map(talker).items()}
    if talker.hidden_size != talker.code_predictor.hidden_size:
        names = (f"code_predictor.input_projection.{kind}" for kind in ("weight", "bias"))
        table |= {name: [Rows(name)] for name in names}
    return table


def _code_predictor(talker: TalkerConfig) -> TensorMap:
    """Tensor map of the code predictor, whose embeddings and heads are stacks of theirs."""
    ours, theirs, sizes = "code_predictor.", "talker.code_predictor.", talker.code_predictor
    table: TensorMap = {f"{ours}norm.weight": [Rows(f"{theirs}model.norm.weight")]}
    for stack, name in (("embeddings", "model.codec_embedding"), ("heads", "lm_head")):
        table[ours + stack] = [
            Rows(f"{theirs}{name}.{i}.weight", 0, talker.codebook_size) for i in range(talker.num_code_groups - 1)
        ]
    widths = {"q": sizes.num_attention_heads, "k": sizes.num_key_value_heads, "v": sizes.num_key_value_heads}
    layer: TensorMap = {
        "input_norm.weight": [Rows("input_layernorm.weight")],
        "qkv.weight": [Rows(f"self_attn.{k}_proj.weight", 0, heads * sizes.head_dim) for k, heads in widths.items()],
        "query_norm.weight": [Rows("self_attn.q_norm.weight")],
        "key_norm.weight": [Rows("self_attn.k_norm.weight")],
        "output.weight": [Rows("self_attn.o_proj.weight")],
        "mlp_norm.weight": [Rows("post_attention_layernorm.weight")],
        "gate_up.weight": gate_up("mlp", sizes.intermediate_size),
        "down.weight": [Rows("mlp.down_proj.weight")],
    }
    for i in range(sizes.num_hidden_layers):
        for name, parts in layer.items():
            table[f"{ours}layers.{i}.{name}"] = [
                Rows(f"{theirs}model.layers.{i}.{part.name}", part.start, part.stop) for part in parts
            ]
    return table
