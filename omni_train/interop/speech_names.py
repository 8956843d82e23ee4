"""Correspondence of module names of codec and Code2Wav with transformers', in both directions.

Parameters keep their names within a module. Only codebooks differ: theirs are one by one, ours stacked.
"""

from __future__ import annotations

from omni_train.recipe.schema import Code2WavConfig, CodecConfig

# Ours -> theirs, within a layer of either Transformer.
_LAYER = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention_scale": "self_attn_layer_scale",
    "mlp_scale": "mlp_layer_scale",
}
CODEBOOK_BUFFERS = ("initialized", "cluster_usage", "embed_sum")


def mimi_modules(config: CodecConfig) -> dict[str, str]:
    """Our module names -> MimiModel's, of the encoder and the quantiser's projections."""
    # Theirs is one flat list, with the activations in it.
    names = {"encoder.first": "encoder.layers.0.conv"}
    position = 1
    for stage in range(len(config.upsampling_ratios)):
        ours = f"encoder.stages.{stage}"
        for unit in range(config.num_residual_layers):
            names[f"{ours}.units.{unit}.narrow"] = f"encoder.layers.{position}.block.1.conv"
            names[f"{ours}.units.{unit}.widen"] = f"encoder.layers.{position}.block.3.conv"
            position += 1
        names[f"{ours}.down"] = f"encoder.layers.{position + 1}.conv"
        position += 2
    names["encoder.last"] = f"encoder.layers.{position + 1}.conv"
    names["encoder.downsample"] = "downsample.conv"
    layer = {**_LAYER, "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    names |= _layers("encoder.transformer", "encoder_transformer", config.num_hidden_layers, layer)
    for part in ("semantic", "acoustic"):
        names[f"quantizer.{part}.input"] = f"quantizer.{part}_residual_vector_quantizer.input_proj"
        names[f"quantizer.{part}.output"] = f"quantizer.{part}_residual_vector_quantizer.output_proj"
    return names


def mimi_codebooks(config: CodecConfig) -> dict[str, list[str]]:
    """Our names of stacked codebook buffers -> MimiModel's names of each codebook's, in order."""
    counts = {
        "semantic": config.num_semantic_quantizers,
        "acoustic": config.num_quantizers - config.num_semantic_quantizers,
    }
    return {
        f"quantizer.{part}.codebooks.{buffer}": [
            f"quantizer.{part}_residual_vector_quantizer.layers.{number}.codebook.{buffer}" for number in range(count)
        ]
        for part, count in counts.items()
        for buffer in CODEBOOK_BUFFERS
    }


def code2wav_modules(config: Code2WavConfig) -> dict[str, str]:
    """Our module names of Code2Wav -> Qwen3-Omni's."""
    layer = {**_LAYER, "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    names = {"embedding": "code_embedding", "decoder.transformer.norm": "pre_transformer.norm"}
    names |= _layers("decoder.transformer", "pre_transformer", config.num_hidden_layers, layer)
    for stage in range(len(config.upsampling_ratios)):
        ours, theirs = f"decoder.upsample.{stage}", f"upsample.{stage}"
        names |= {
            f"{ours}.up": f"{theirs}.0.conv",
            f"{ours}.block": f"{theirs}.1",
            f"{ours}.block.depthwise": f"{theirs}.1.dwconv.conv",
            f"{ours}.block.norm": f"{theirs}.1.norm",
            f"{ours}.block.up": f"{theirs}.1.pwconv1",
            f"{ours}.block.down": f"{theirs}.1.pwconv2",
        }
    names["decoder.first"] = "decoder.0.conv"
    stages = len(config.upsample_rates)
    for stage in range(stages):
        ours, theirs = f"decoder.stages.{stage}", f"decoder.{stage + 1}.block"
        names |= {f"{ours}.activation": f"{theirs}.0", f"{ours}.up": f"{theirs}.1.conv"}
        for unit in range(3):
            names |= {
                f"{ours}.units.{unit}.wide_activation": f"{theirs}.{unit + 2}.act1",
                f"{ours}.units.{unit}.wide": f"{theirs}.{unit + 2}.conv1.conv",
                f"{ours}.units.{unit}.point_activation": f"{theirs}.{unit + 2}.act2",
                f"{ours}.units.{unit}.point": f"{theirs}.{unit + 2}.conv2.conv",
            }
    names["decoder.last_activation"] = f"decoder.{stages + 1}"
    names["decoder.last"] = f"decoder.{stages + 2}.conv"
    return names


def _layers(ours: str, theirs: str, count: int, layer: dict[str, str]) -> dict[str, str]:
    return {
        f"{ours}.layers.{number}.{mine}": f"{theirs}.layers.{number}.{other}"
        for number in range(count)
        for mine, other in layer.items()
    }
