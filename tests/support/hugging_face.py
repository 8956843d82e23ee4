"""Small random Qwen3.5 models of transformers, saved as folders."""

from __future__ import annotations

from pathlib import Path

import torch

SIZES = dict(
    vocab_size=106,
    hidden_size=40,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=12,
    linear_value_head_dim=10,
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 3000.0,
        "partial_rotary_factor": 0.8,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
)
MOE_SIZES = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, shared_expert_intermediate_size=22)


def small_model(format: str, seed: int = 5, **changes):
    """A model whose every parameter is random, norms and decays too, so that one mapped wrongly shows."""
    import transformers

    torch.manual_seed(seed)
    if format == "qwen3_5_moe":
        config = transformers.Qwen3_5MoeTextConfig(**(SIZES | MOE_SIZES | changes))
        model = transformers.Qwen3_5MoeForCausalLM(config)
    else:
        config = transformers.Qwen3_5TextConfig(
            **(SIZES | dict(intermediate_size=58, tie_word_embeddings=True) | changes)
        )
        model = transformers.Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "conv1d" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors in the place of a folder's."""
    from safetensors.torch import save_file

    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def with_mtp(tensors: dict[str, torch.Tensor], seed: int = 2) -> dict[str, torch.Tensor]:
    """A folder's tensors with a multi-token-prediction layer, a shuffle of the layer with attention."""
    generator = torch.Generator().manual_seed(seed)
    out, hidden = dict(tensors), SIZES["hidden_size"]
    for name, tensor in tensors.items():
        if name.startswith("model.layers.1."):
            order = torch.randperm(len(tensor), generator=generator)
            out["mtp.layers.0." + name.removeprefix("model.layers.1.")] = tensor[order]
    out["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) / hidden**0.5
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        out[f"mtp.{name}.weight"] = torch.randn(hidden, generator=generator) * 0.3
    return out
