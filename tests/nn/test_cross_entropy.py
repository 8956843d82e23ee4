"""The chunked loss equals the plain one, on one rank and split over the vocabulary, in bounded memory."""

import pytest
import torch
import torch.nn.functional as F

from omni_train.data.rows.batch import IGNORE
from omni_train.nn.cross_entropy import chunked_cross_entropy


def problem(tokens=37, words=53, hidden_size=11, dtype=torch.float32, ignored=0.3, seed=7):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(words, hidden_size, generator=generator).to(dtype)
    labels = torch.randint(words, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    loss_weights = torch.rand(tokens, generator=generator) * 2
    return hidden, weight, labels, loss_weights


def plain(hidden, weight, labels, loss_weights, scale=1.0):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    losses = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none", ignore_index=IGNORE)
    total = (losses * loss_weights).sum()
    (total * scale).backward()
    return total.detach(), losses.detach(), hidden.grad, weight.grad


def chunked(hidden, weight, labels, loss_weights, scale=1.0, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, losses = chunked_cross_entropy(hidden, weight, labels, loss_weights, **options)
    (total * scale).backward()
    return total.detach(), losses, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
def test_values_and_gradients_equal_plain_cross_entropy(chunk_tokens):
    inputs = problem()
    torch.testing.assert_close(chunked(*inputs, 0.3, chunk_tokens=chunk_tokens), plain(*inputs, 0.3))


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    hidden, weight, labels, loss_weights = problem()
    inputs = (hidden * 300, weight, labels, loss_weights)
    torch.testing.assert_close(chunked(*inputs, chunk_tokens=8), plain(*inputs), rtol=1e-4, atol=1e-4)


def test_bf16_gradients_stay_close_to_those_of_fp32():
    inputs = problem(tokens=129, words=301, dtype=torch.bfloat16)
    total, losses, grad_hidden, grad_weight = chunked(*inputs, chunk_tokens=16)
    expected = plain(*(value.float() if value.is_floating_point() else value for value in inputs))
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16 and total.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(total, expected[0], rtol=1e-2, atol=0)
    for ours, reference in zip((grad_hidden, grad_weight), expected[2:], strict=True):
        assert (ours.float() - reference).norm() < 0.01 * reference.norm()


def test_a_row_without_labels_gives_zero_loss_and_zero_gradients():
    hidden, weight, labels, loss_weights = problem()
    total, losses, grad_hidden, grad_weight = chunked(
        hidden, weight, torch.full_like(labels, IGNORE), loss_weights, chunk_tokens=8
    )
    assert total == 0 and not losses.any() and not grad_hidden.any() and not grad_weight.any()


def test_a_frozen_weight_gets_no_gradient_and_evaluation_builds_no_graph():
    hidden, weight, labels, loss_weights = problem()
    hidden.requires_grad_()
    total, _ = chunked_cross_entropy(hidden, weight, labels, loss_weights, chunk_tokens=8)
    total.backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, plain(hidden.detach(), weight, labels, loss_weights)[2])
    with torch.no_grad():
        evaluated, _ = chunked_cross_entropy(hidden, weight, labels, loss_weights, chunk_tokens=8)
    assert not evaluated.requires_grad and evaluated == total


def test_a_second_backward_is_refused():
    hidden, weight, labels, loss_weights = problem()
    total, _ = chunked_cross_entropy(hidden.requires_grad_(), weight, labels, loss_weights, chunk_tokens=8)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()


def on_rank(rank, world_size, inputs, sequence_parallel):
    hidden, weight, labels, loss_weights = inputs
    part = hidden.chunk(world_size)[rank] if sequence_parallel else hidden
    return chunked(
        part,
        weight.chunk(world_size)[rank],
        labels,
        loss_weights,
        0.3,
        chunk_tokens=8,
        tp_group=torch.distributed.group.WORLD,
        sequence_parallel=sequence_parallel,
    )


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_tensor_parallel_ranks_equal_one(distributed, sequence_parallel):
    inputs = problem(tokens=38, words=54)
    total, losses, grad_hidden, grad_weight = plain(*inputs, 0.3)
    results = distributed(2, on_rank, inputs, sequence_parallel)
    for rank_total, rank_losses, rank_grad_hidden, _ in results:
        torch.testing.assert_close((rank_total, rank_losses), (total, losses))
        if not sequence_parallel:
            torch.testing.assert_close(rank_grad_hidden, grad_hidden)
    if sequence_parallel:
        torch.testing.assert_close(torch.cat([result[2] for result in results]), grad_hidden)
    torch.testing.assert_close(torch.cat([result[3] for result in results]), grad_weight)


def test_peak_memory_is_one_chunk_of_logits():
    from benchmarks.cross_entropy import peak_bytes

    tokens, words, hidden_size, chunk_tokens = 4096, 65_536, 16, 256
    logits_of_a_chunk = 4 * chunk_tokens * words
    assert peak_bytes(tokens, words, hidden_size, chunk_tokens) < 1.5 * logits_of_a_chunk
