"""TM-RoPE is the interleaved rotary embedding of transformers' Qwen3.5, token by token."""

import pytest
import torch
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding, apply_rotary_pos_emb

from omni_train.nn.rotary import TMRotaryEmbedding, apply_rotary

LAYOUTS = [(256, 0.25, [11, 11, 10]), (128, 1.0, [24, 20, 20]), (24, 0.5, [2, 2, 2]), (32, 0.25, [4, 0, 0])]


def reference(head_dim, factor, sections, theta=1e7):
    config = Qwen3_5MoeTextConfig(
        head_dim=head_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": factor,
            "mrope_section": sections,
        },
    )
    return Qwen3_5MoeTextRotaryEmbedding(config)


@pytest.mark.parametrize(("head_dim", "factor", "sections"), LAYOUTS)
@pytest.mark.parametrize("kind", ["integer", "float"])
def test_rotated_queries_and_keys_equal_transformers(head_dim, factor, sections, kind):
    torch.manual_seed(41)
    tokens, rotary_dim = 29, int(head_dim * factor)
    ids = torch.randint(0, 5000, (3, tokens)) if kind == "integer" else torch.rand(3, tokens) * 777
    query, key = torch.randn(tokens, 5, head_dim), torch.randn(tokens, 2, head_dim)

    cos, sin = reference(head_dim, factor, sections)(query, ids[:, None])
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)

    rotary = TMRotaryEmbedding(rotary_dim, 1e7, sections)(ids)
    assert rotary.shape == (tokens, 1, rotary_dim)
    for ours, theirs in zip((query, key), expected, strict=True):
        torch.testing.assert_close(apply_rotary(ours, rotary), theirs[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_the_gradient_turns_back_by_the_same_angles():
    torch.manual_seed(42)
    rotary = TMRotaryEmbedding(10, 1e4, [3, 1, 1])(torch.randint(0, 900, (3, 13)))
    x, grad = torch.randn(13, 3, 16, requires_grad=True), torch.randn(13, 3, 16)
    rotated = apply_rotary(x, rotary)
    rotated.backward(grad)
    cos, sin = rotary.chunk(2, dim=-1)
    torch.testing.assert_close(x.grad, apply_rotary(grad, torch.cat([cos, -sin], dim=-1)))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_text_reads_as_one_dimensional_rotary_whatever_the_sections():
    ids = torch.arange(50).expand(3, -1)
    torch.testing.assert_close(TMRotaryEmbedding(12, 1e4, [2, 2, 2])(ids), TMRotaryEmbedding(12, 1e4, [6, 0, 0])(ids))


def test_each_axis_turns_its_own_frequencies():
    at_rest = torch.zeros(3, 1)
    embedding = TMRotaryEmbedding(64, 1e7, [11, 11, 10])
    for axis, count in enumerate([11, 11, 10]):
        ids = at_rest.clone()
        ids[axis] = 1.0
        sines = embedding(ids)[0, 0, 32:]
        turned = sines.nonzero().flatten().tolist()
        assert turned == list(range(axis, 32, 3))[:count]


def test_bf16_heads_are_rotated_in_fp32_at_positions_that_bf16_cannot_tell_apart():
    ids = torch.tensor([200_001, 200_002]).expand(3, -1)
    rotary = TMRotaryEmbedding(4, 1e4, [2, 0, 0])(ids)
    x = torch.ones(2, 1, 4, dtype=torch.bfloat16)
    out = apply_rotary(x, rotary)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, apply_rotary(x.float(), rotary).bfloat16(), rtol=0, atol=0)
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("sections", [[3, 1, 1], [0, 3, 3], [2, 2, 3], [4, 4, 4]])
def test_sections_that_cannot_be_interleaved_are_refused_by_name(sections):
    with pytest.raises(ValueError, match="mrope_section"):
        TMRotaryEmbedding(12, 1e4, sections)
