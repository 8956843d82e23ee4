"""The causal Transformer with a sliding window: blocks, streams and positions."""

import pytest
import torch
import torch.nn.functional as F

from omni_train.nn.causal_transformer import CausalTransformer, window_attention


def random(*shape, seed=2):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masked(query, key, value, window):
    """Attention by a mask of all pairs."""
    T, S = query.shape[2], key.shape[2]
    back = torch.arange(S - T, S)[:, None] - torch.arange(S)
    return F.scaled_dot_product_attention(query, key, value, (back >= 0) & (back < window))


@pytest.mark.parametrize("window", [1, 5, 12])
@pytest.mark.parametrize("frames", [1, 4, 5, 6, 10, 11, 15, 37])
def test_attention_in_blocks_is_attention_by_a_mask(frames, window):
    inputs = [random(2, 3, frames, 4, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    weight = random(2, 3, frames, 4, seed=4)
    have, want = window_attention(*inputs, window), masked(*inputs, window)
    torch.testing.assert_close(have, want)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (have, want)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("asked", "seen"), [(1, 5), (1, 7), (3, 7), (9, 12), (20, 24)])
def test_the_last_frames_of_many(asked, seen):
    query, key, value = random(1, 2, asked, 4), random(1, 2, seen, 4, seed=5), random(1, 2, seen, 4, seed=6)
    torch.testing.assert_close(window_attention(query, key, value, 5), masked(query, key, value, 5))


def build(gated, kv_heads):
    torch.manual_seed(3)
    return CausalTransformer(
        hidden_size=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=6,
        intermediate_size=14,
        window=6,
        rope_theta=100.0,
        layer_scale=0.5,
        eps=1e-5,
        gated=gated,
    )


@torch.no_grad()
@pytest.mark.parametrize("pieces", [(1,) * 31, (3, 8, 20), (13, 17, 1)])
@pytest.mark.parametrize(("gated", "kv_heads"), [(True, 4), (False, 2)])
def test_a_stream_gives_what_the_whole_gives(gated, kv_heads, pieces):
    network, stream = build(gated, kv_heads), {}
    x = random(2, 31, 12)
    y = torch.cat([network(piece, stream) for piece in x.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_stream_remembers_no_more_than_its_window():
    network, stream = build(True, 4), {}
    for piece in random(1, 50, 12).split(7, dim=1):
        network(piece, stream)
    sizes = {x.shape[2] for kept in stream.values() if isinstance(kept, tuple) for x in kept}
    assert sizes == {5}


@torch.no_grad()
def test_what_a_frame_sees():
    """Three layers of a window of six: itself and 15 frames before it."""
    network = build(False, 4).double()  # in which no difference is lost
    x = random(1, 40, 12).double()
    other = x.clone()
    other[0, 10] += random(12, seed=8)  # not the same everywhere, which the norms take out
    different = (network(x) != network(other)).any(-1)[0].nonzero().flatten().tolist()
    assert different == list(range(10, 26))


def test_a_network_first_used_for_inference_can_be_trained():
    network, x = build(True, 4), random(1, 33, 12)
    with torch.inference_mode():
        network(x)
    network(x).sum().backward()
    assert network.layers[0].attention.key.weight.grad.abs().sum() > 0
