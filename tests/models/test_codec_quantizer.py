"""The quantiser in training: what it draws, how its codebooks move, and that no layout shows."""

import pytest
import torch

from omni_train.models.codec import Regularization, SplitQuantizer, usage_of
from omni_train.models.codec.codebooks import Codebooks
from tests.support.speech import CODEC, randomized


def latents(batch, frames, seed=1):
    return torch.randn(batch, frames, CODEC.hidden_size, generator=torch.Generator().manual_seed(seed))


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def quantizer():
    return randomized(SplitQuantizer(CODEC)).train()


def test_a_sequence_is_quantised_by_its_first_codebooks_or_not_at_all(quantizer):
    x = latents(300, 3)
    with torch.no_grad():
        out = quantizer(x, generator(2), Regularization(quantize_rate=0.7, dropout_rate=0.6))
        passed = sum(part.output(part.input(x.mT)).mT for part in (quantizer.semantic, quantizer.acoustic))
        plain = quantizer(x)
    assert torch.equal(out.codes, plain.codes)
    torch.testing.assert_close(out.semantic, quantizer.decode(plain.codes[:, :1]), rtol=1e-4, atol=1e-5)
    used = out.commitment > 0
    counts = used.sum(1)
    assert torch.equal(used, torch.arange(7) < counts[:, None])  # always the first
    unquantised = []
    for row in range(300):
        decoded = quantizer.decode(out.codes[row : row + 1, : counts[row]])[0]
        unquantised.append(torch.allclose(out.latents[row], passed[row], atol=1e-5))
        assert unquantised[-1] or torch.allclose(out.latents[row], decoded, atol=1e-5)
    assert 0.22 < sum(unquantised) / 300 < 0.38
    # 2 to 7 codebooks are drawn alike in 0.6 of the sequences; 0.4 have all 7.
    shares = counts.bincount(minlength=8) / 300
    assert shares[:2].tolist() == [0, 0] and bool((shares[2:7] > 0.04).all()) and bool((shares[2:7] < 0.17).all())
    assert 0.4 < shares[7] < 0.6


def test_a_sequence_of_the_semantic_codebook_alone_is_quantised_and_asks_nothing_of_the_others(quantizer):
    x = latents(300, 3)
    out = quantizer(x, generator(2), Regularization(quantize_rate=0.2, dropout_rate=0.6, semantic_rate=0.4))
    alone = (out.commitment > 0).sum(1) == 1
    assert 0.3 < alone.float().mean() < 0.5
    torch.testing.assert_close(out.latents[alone], quantizer.decode(out.codes[alone, :1]), rtol=1e-4, atol=1e-5)
    counts = quantizer.acoustic.codebooks._counts.sum(1)
    assert counts[0] == 3 * (~alone).sum() and quantizer.semantic.codebooks._counts.sum() == 900
    out.latents[alone].sum().backward()
    assert quantizer.semantic.output.weight.grad.abs().max() > 0
    assert quantizer.acoustic.output.weight.grad.abs().max() == 0


def test_what_is_drawn_depends_on_the_generator_alone(quantizer):
    x, harder = latents(20, 3), Regularization(0.5, 0.5)
    once, again, other = (quantizer(x, generator(seed), harder).latents for seed in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_gradients_pass_straight_through(quantizer):
    x = latents(3, 5).requires_grad_()
    weight = latents(3, 5, seed=9)
    (quantizer(x).latents * weight).sum().backward()
    parts = (quantizer.semantic, quantizer.acoustic)
    want = sum((weight @ part.output.weight[..., 0]) @ part.input.weight[..., 0] for part in parts)
    torch.testing.assert_close(x.grad, want)


def test_commitment_pulls_each_codebooks_input_to_its_codeword(quantizer):
    x = latents(2, 4)
    out = quantizer(x)
    part = quantizer.acoustic
    residual = part.input(x.mT).mT
    for number, codebook in enumerate(part.codebooks.codewords):
        codeword = codebook[out.codes[:, 1 + number]]
        torch.testing.assert_close(out.commitment[:, 1 + number], (residual - codeword).square().mean((1, 2)))
        residual = residual - codeword


def test_moving_averages_by_hand():
    """Codewords 0 = 0/1 and 3 = 9/3 meet the inputs 1 | 2, 5; averages keep three quarters."""
    codebooks = Codebooks(count=1, size=2, dim=1)
    codebooks.load_state_dict(
        {
            "initialized": torch.ones(1),
            "cluster_usage": torch.tensor([[1.0, 3.0]]),
            "embed_sum": torch.tensor([[[0.0], [9.0]]]),
        }
    )
    x = torch.tensor([[[1.0], [2.0], [5.0]]])
    codes, sums = codebooks.quantize(x[0], 1)
    assert codes.tolist() == [[0, 1, 1]] and sums.flatten().tolist() == [0, 3, 3]
    codebooks.accumulate(x, sums[:, None], codes[:, None], torch.tensor([1]))
    usage = codebooks.update(generator(0), decay=0.75, dead_usage=0.1)
    assert codebooks.cluster_usage.tolist() == [[1.0, 2.75]]
    assert codebooks.embed_sum.flatten().tolist() == [0.25, 8.5]
    assert codebooks.codewords.flatten().tolist() == pytest.approx([0.25, 8.5 / 2.75])
    assert usage.used.tolist() == [1.0] and usage.revived.tolist() == [0.0]
    assert usage.perplexity.tolist() == pytest.approx([(3 ** (1 / 3)) * (1.5 ** (2 / 3))])


def test_a_dropped_codebook_counts_nothing(quantizer):
    quantizer(latents(40, 3), generator(5), Regularization(dropout_rate=1.0))
    codebooks = quantizer.acoustic.codebooks
    seen = codebooks._counts.sum(1)
    assert seen[0] == 120 and bool((seen.diff() < 0).all()) and seen[-1] > 0


def test_before_the_first_update_latents_pass_and_k_means_finds_their_clusters():
    quantizer = SplitQuantizer(CODEC).train()
    centres = 20 * latents(1, 4)[0]
    x = centres[torch.arange(120) % 4].view(6, 20, -1) + 0.01 * latents(6, 20, seed=2)
    first = quantizer(x, generator(1))
    assert not first.commitment.any() and not first.codes.any()
    assert first.latents.grad_fn is not None
    quantizer.update(generator(2))
    out = quantizer(x)
    assert out.commitment[:, :2].max() < 1e-3  # of a cluster's inputs only the noise is left
    assert len(out.codes[:, 0].unique()) > 4
    torch.testing.assert_close(out.latents, first.latents, rtol=0, atol=0.1)


def test_codewords_that_nobody_uses_begin_anew_at_an_input(quantizer):
    codebooks = quantizer.acoustic.codebooks
    codebooks.cluster_usage[0, 3:9] = 1.0
    codebooks.embed_sum[0, 3:9] = 1e4  # far from everything
    codebooks._derived = None
    x = latents(30, 4)
    inputs = quantizer.acoustic.input(x.mT).mT.detach().flatten(0, 1)
    for step in range(300):
        quantizer(x, generator(step))
        usage = quantizer.update(generator(step), decay=0.9)
        if usage.revived[1] >= 6:
            break
    assert step > 2  # not before the average is low
    fresh = codebooks.codewords[0, 3:9]
    distances = torch.cdist(fresh, inputs)
    assert distances.min(1).values.max() < 1e-3
    assert len(distances.argmin(1).unique()) == 6
    quantizer(x, generator(0))
    used = codebooks._counts[0, 3:9]
    assert bool((used >= 1).all())


def test_use_of_a_codebook_in_metrics():
    used, perplexity = usage_of(torch.tensor([[5.0, 5.0, 5.0, 5.0], [7.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert used.tolist() == [1.0, 0.25, 0.0]
    assert perplexity.tolist() == pytest.approx([4.0, 1.0, 1.0])


def train(rank, world_size, rows, start):
    """Codebooks after steps on a global batch of rows that the ranks share; each row is seeded on its own."""
    quantizer = SplitQuantizer(CODEC).train()
    quantizer.load_state_dict(start)
    metrics = []
    for step in range(4):
        for row in range(rank, rows, world_size):
            seed = 100 * step + row
            quantizer(latents(5, 4, seed), generator(seed), Regularization(0.5, 0.5))
        metrics.append(torch.stack(quantizer.update(generator(step), decay=0.3, dead_usage=0.5)))
    return {name: buffer for name, buffer in quantizer.state_dict().items() if "codebooks" in name}, metrics


def test_codebooks_move_alike_in_every_layout(distributed):
    """From k-means on, with dead codewords that begin anew, on one, two and three ranks."""
    torch.manual_seed(3)
    start = SplitQuantizer(CODEC).state_dict()
    ((alone, metrics),) = distributed(1, train, 6, start)
    assert sum(step[2].sum() for step in metrics) > 20  # some did begin anew
    for world_size in (2, 3):
        ranks = distributed(world_size, train, 6, start)
        for state, _ in ranks[1:]:
            assert all(torch.equal(state[name], ranks[0][0][name]) for name in state)
        for name, buffer in ranks[0][0].items():
            torch.testing.assert_close(buffer, alone[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ranks[0][1], metrics, rtol=1e-4, atol=1e-4)


def test_codebooks_survive_a_checkpoint(quantizer):
    other = SplitQuantizer(CODEC)
    x = latents(3, 5)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.encode(x), quantizer.encode(x))
