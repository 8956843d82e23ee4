"""The recognizer: each clip as if alone, nothing ahead seen, and the same a token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from omni_train.recipe.schema import Precision, Recompute
from tests.support.recognizer import CLIPS, FIRST_WORD, START, build, recognizer_recipe, row_of, utterances


def logits_of(model, row, window):
    """(D, V) logits of all labels of a row."""
    from omni_train.models.recognizer import EncoderOutput, Spans, Utterances

    given = Utterances.from_batch(row)
    hidden, lengths = model.encode_audio(given.mel, given.mel_cu_seqlens, window)
    device = hidden.device
    return model.audio_decoder(
        given.tokens, Spans(given.lengths, device), EncoderOutput(hidden, Spans(lengths, device))
    )


def with_transcripts(given):
    """The words of each clip for CTC: behind the tag and its end, and before the last token."""
    given.transcripts = [labels[2:-1] for labels in given.labels.split(given.lengths)]
    return given


def backward(model, rows, window):
    """Losses and gradients of rows, added up."""
    from omni_train.models.recognizer import Utterances

    model.zero_grad()
    losses = []
    for row in rows:
        out = model(with_transcripts(Utterances.from_batch(row)), window)
        (out.loss + out.ctc_losses.sum()).backward()
        losses.append(float(out.loss.detach()))
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def alone_and_together(rank, world_size, recipe, window):
    from omni_train import platform

    model = build(recipe).train()
    sequences = utterances(recipe)
    with torch.no_grad():
        together = logits_of(model, row_of(sequences), window)
        alone = torch.cat([logits_of(model, row_of([one], alignment=1), window) for one in sequences])
    (loss,), gradients = backward(model, [row_of(sequences)], window)
    losses, added = backward(model, [row_of([one]) for one in sequences], window)
    platform.parallel.destroy()
    return (together, alone), (loss, sum(losses)), (gradients, added)


@pytest.mark.parametrize("window", [0, 48])
def test_a_clip_among_others_gives_the_logits_loss_and_gradients_that_it_gives_alone(distributed, window):
    logits, losses, gradients = distributed(1, alone_and_together, recognizer_recipe(ctc=True), window)[0]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        largest = float(gradient.abs().max())  # what is small beside it is a difference of large numbers
        assert largest > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=5e-5 * largest, msg=name)


def test_recomputation_changes_no_gradient(distributed):
    recipe = recognizer_recipe(ctc=True)
    kept = distributed(1, alone_and_together, recipe, 48)[0][2][0]
    again = distributed(1, alone_and_together, dataclasses.replace(recipe, recompute=Recompute.full), 48)[0][2][0]
    torch.testing.assert_close(again, kept)


def influences(rank, world_size, recipe):
    """Which logits change with one word, and which with one clip."""
    from omni_train import platform

    model = build(recipe)
    sequences = utterances(recipe)
    with torch.no_grad():
        before = logits_of(model, row_of(sequences), 0)
        row = row_of(sequences)
        place = int(row.cu_seqlens[2]) + len(sequences[2]) - 5  # a word of the third clip
        row.tokens[place] = FIRST_WORD + (row.tokens[place] + 1 - FIRST_WORD) % 50
        word = (logits_of(model, row, 0) != before).any(1).nonzero().squeeze(1).tolist()
        row = row_of(sequences)
        row.mel[170] += 1.0  # of the second clip
        sound = (logits_of(model, row, 0) != before).any(1).nonzero().squeeze(1).tolist()
    platform.parallel.destroy()
    return word, sound


def test_a_word_reaches_what_follows_in_its_transcript_and_a_sound_its_own_transcript(distributed):
    word, sound = distributed(1, influences, recognizer_recipe())[0]
    lengths = [words + 3 for _, words in CLIPS]  # <|im_start|>, the tag, its end, the words
    first = sum(lengths[:2])
    assert word == list(range(first + lengths[2] - 4, first + lengths[2]))
    assert sound == list(range(lengths[0], lengths[0] + lengths[1]))


def step_by_step(rank, world_size, recipe, hypotheses):
    """Log-probabilities of a token at a time, and of all at once."""
    from omni_train import platform
    from omni_train.models.recognizer import Utterances

    model = build(recipe)
    sequences = utterances(recipe, [(frames, 6) for frames, _ in CLIPS])
    row = row_of(sequences)
    given = Utterances.from_batch(row)
    tokens_NL = given.tokens.view(len(sequences), -1)
    with torch.no_grad():
        expected = logits_of(model, row, 48).float().log_softmax(-1).view(*tokens_NL.shape, -1)
        state = model.prefill(given.mel, given.mel_cu_seqlens, 48, hypotheses)
        steps = [model.step(state, column.repeat_interleave(hypotheses)) for column in tokens_NL.T]
    platform.parallel.destroy()
    return torch.stack(steps, 1), expected.repeat_interleave(hypotheses, 0)


@pytest.mark.parametrize("hypotheses", [1, 3])
def test_a_token_at_a_time_gives_what_the_parallel_pass_gives(distributed, hypotheses):
    steps, expected = distributed(1, step_by_step, recognizer_recipe(), hypotheses)[0]
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=1e-4)


def chosen_again(rank, world_size, recipe):
    """Hypotheses exchanged within their clip, and the same written from the start."""
    from omni_train import platform
    from omni_train.models.recognizer import Utterances

    model = build(recipe)
    given = Utterances.from_batch(row_of(utterances(recipe, CLIPS[:2])))
    with torch.no_grad():
        state = model.prefill(given.mel, given.mel_cu_seqlens, 0, 2)
        for tokens in ([START] * 4, [7, 8, 9, 10]):
            model.step(state, torch.tensor(tokens))
        state.reorder(torch.tensor([1, 1, 3, 2]))
        exchanged = model.step(state, torch.tensor([11, 12, 13, 14]))
        state = model.prefill(given.mel, given.mel_cu_seqlens, 0, 2)
        for tokens in ([START] * 4, [8, 8, 10, 9], [11, 12, 13, 14]):
            anew = model.step(state, torch.tensor(tokens))
    platform.parallel.destroy()
    return exchanged, anew


def test_hypotheses_take_their_cache_along(distributed):
    torch.testing.assert_close(*distributed(1, chosen_again, recognizer_recipe())[0])


def in_both_precisions(rank, world_size, recipe):
    """The loss of the same parameters in fp32, and in bf16 with what became of the gradients."""
    from omni_train import platform
    from omni_train.models.recognizer import SpeechRecognizer, Utterances

    exact = build(recipe)
    rounded = SpeechRecognizer(dataclasses.replace(recipe, precision=Precision.bf16))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    rounded.load_state_dict(exact.state_dict())
    given = with_transcripts(Utterances.from_batch(row_of(utterances(recipe))))
    expected, out = exact(given, 48), rounded(given, 48)
    (out.loss + out.ctc_losses.sum()).backward()
    finite = all(parameter.grad.isfinite().all() for parameter in rounded.parameters())
    platform.parallel.destroy()
    return expected.loss.item(), out.loss.item(), finite


def test_bf16_loses_little(distributed):
    exact, rounded, finite = distributed(1, in_both_precisions, recognizer_recipe(ctc=True))[0]
    assert rounded == pytest.approx(exact, rel=0.01) and finite
