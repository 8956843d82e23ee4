"""Small networks of the codec, with random weights that make signals of ordinary size."""

import torch

from omni_train.recipe.schema import Code2WavConfig, CodecConfig

CODEC = CodecConfig(
    num_filters=4,
    num_residual_layers=2,
    hidden_size=18,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=6,
    intermediate_size=26,
    sliding_window=11,
    num_quantizers=7,
    codebook_size=32,
    codebook_dim=5,
)
CODE2WAV = Code2WavConfig(
    codebook_size=32,
    num_quantizers=7,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=22,
    sliding_window=6,
    decoder_dim=48,
)


@torch.no_grad()
def randomized(network, seed=5):
    """The network, every parameter drawn so that each layer shows in the output; codebooks as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(std=0.65 * fan_in**-0.5, generator=generator)
        else:  # biases, norms, the activations' factors, LayerScale
            centre = 0.0 if name.endswith(("bias", "alpha", "beta")) else 0.6
            parameter.normal_(centre, 0.1, generator=generator)
    for name, buffer in network.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(generator=generator)
        elif name.endswith("cluster_usage"):
            buffer.uniform_(0.5, 2.0, generator=generator)
        elif name.endswith("initialized"):
            buffer.fill_(1.0)
    return network.eval()


def sound(*shape, seed=6):
    """Noise of a voice's loudness."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def random_codes(batch, frames, config=CODE2WAV, seed=7):
    """(batch, codebooks, frames)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (batch, config.num_quantizers, frames), generator=generator)
