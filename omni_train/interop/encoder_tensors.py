"""Correspondence of tensors of our encoders and adapters with transformers' Qwen3-Omni and Qwen3.5 towers.

Theirs hold the adapter inside the tower. Otherwise only queries, keys and values differ: ours are ordered by head.
"""

from __future__ import annotations

from omni_train.interop.families import Names
from omni_train.interop.rows import Rows, TensorMap
from omni_train.recipe.schema import AudioEncoderConfig, VisionEncoderConfig


def audio_map(audio: AudioEncoderConfig, tower: str) -> TensorMap:
    """Tensor map of ``audio_encoder`` and ``audio_adapter``.

    Args:
        audio: sizes of the encoder.
        tower: prefix of the tower's names in the folder.
    """
    table: TensorMap = {"audio_encoder.conv_out.weight": [Rows(f"{tower}conv_out.weight")]}
    for i in range(audio.num_convolutions):
        table |= _weight_and_bias(f"audio_encoder.convolutions.{i}", f"{tower}conv2d{i + 1}")
    for i in range(audio.num_hidden_layers):
        ours, theirs = f"audio_encoder.layers.{i}.", f"{tower}layers.{i}."
        heads, width = audio.num_attention_heads, audio.hidden_size // audio.num_attention_heads
        for kind in ("weight", "bias"):
            table[f"{ours}self_attention.linear_qkv.{kind}"] = [
                Rows(f"{theirs}self_attn.{part}_proj.{kind}", head * width, (head + 1) * width)
                for head in range(heads)
                for part in "qkv"
            ]
        table |= _weight_and_bias(f"{ours}input_layernorm", f"{theirs}self_attn_layer_norm")
        table |= _weight_and_bias(f"{ours}self_attention.linear_proj", f"{theirs}self_attn.out_proj")
        table |= _weight_and_bias(f"{ours}pre_mlp_layernorm", f"{theirs}final_layer_norm")
        table |= _weight_and_bias(f"{ours}mlp.linear_fc1", f"{theirs}fc1")
        table |= _weight_and_bias(f"{ours}mlp.linear_fc2", f"{theirs}fc2")
    table |= _weight_and_bias("audio_encoder.final_norm", f"{tower}ln_post")
    table |= _weight_and_bias("audio_adapter.linear_fc1", f"{tower}proj1")
    table |= _weight_and_bias("audio_adapter.linear_fc2", f"{tower}proj2")
    return table


def vision_map(vision: VisionEncoderConfig, names: Names) -> TensorMap:
    """Tensor map of ``vision_encoder`` and ``vision_adapter``.

    Args:
        vision: sizes of the encoder.
        names: names of the folder's parts.
    """
    tower = names.vision
    table = _weight_and_bias("vision_encoder.patch_embedding", f"{tower}patch_embed.proj")
    table["vision_encoder.position_embedding.weight"] = [Rows(f"{tower}pos_embed.weight")]
    for i in range(vision.depth):
        ours, theirs = f"vision_encoder.layers.{i}.", f"{tower}blocks.{i}."
        heads, width = vision.num_heads, vision.hidden_size // vision.num_heads
        for kind in ("weight", "bias"):  # theirs: the queries of all heads, then the keys, then the values
            starts = [(part * heads + head) * width for head in range(heads) for part in range(3)]
            table[f"{ours}self_attention.linear_qkv.{kind}"] = [
                Rows(f"{theirs}attn.qkv.{kind}", start, start + width) for start in starts
            ]
        table |= _weight_and_bias(f"{ours}input_layernorm", f"{theirs}norm1")
        table |= _weight_and_bias(f"{ours}self_attention.linear_proj", f"{theirs}attn.proj")
        table |= _weight_and_bias(f"{ours}pre_mlp_layernorm", f"{theirs}norm2")
        table |= _weight_and_bias(f"{ours}mlp.linear_fc1", f"{theirs}mlp.linear_fc1")
        table |= _weight_and_bias(f"{ours}mlp.linear_fc2", f"{theirs}mlp.linear_fc2")
    mergers = {"vision_adapter.merger.": f"{tower}merger."}
    for i in range(len(vision.deepstack_visual_indexes)):
        mergers[f"vision_adapter.deepstack_mergers.{i}."] = f"{tower}{names.deepstack}.{i}."
    for ours, theirs in mergers.items():
        for mine, name in zip(("norm", "mlp.linear_fc1", "mlp.linear_fc2"), names.merger, strict=True):
            table |= _weight_and_bias(ours + mine, theirs + name)
    return table


def _weight_and_bias(ours: str, theirs: str) -> TensorMap:
    return {f"{ours}.{kind}": [Rows(f"{theirs}.{kind}")] for kind in ("weight", "bias")}
