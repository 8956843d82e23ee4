"""Transcription: greedy takes the likeliest token, beams are never worse, clips do not disturb each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.recognizer import CLIPS, START, STOP, build, recognizer_recipe, utterances


def searched(rank, world_size, recipe, beams, likely_stop):
    """Transcripts by beam, greedy ones written by hand, and the mean log-probability of each."""
    from omni_train import platform
    from omni_train.rollout import transcribe as module

    model = build(recipe)
    with torch.no_grad():
        model.audio_decoder.table.weight[STOP] *= likely_stop
    mels = [one.mel[0] for one in utterances(recipe, CLIPS)]
    options = dict(window_frames=48, start_token=START, stop_token=STOP, max_new_tokens=9)
    found = {beam: module.transcribe(model, mels, beam=beam, **options) for beam in beams}
    by_hand = [_greedy(model, mel, 9) for mel in mels]
    scores = {
        beam: [_score(model, mel, one.tokens) for mel, one in zip(mels, of_beam, strict=True)]
        for beam, of_beam in found.items()
    }
    module.CLIPS = 2
    in_pairs = module.transcribe(model, mels, beam=max(beams), **options)
    module.CLIPS = 32
    platform.parallel.destroy()
    return found, by_hand, scores, in_pairs


def _greedy(model, mel, most):
    tokens = []
    while len(tokens) < most and tokens[-1:] != [STOP]:
        tokens.append(int(_log_probs(model, mel, tokens)[-1].argmax()))
    return tokens


def _score(model, mel, tokens):
    log_probs = _log_probs(model, mel, tokens[:-1])
    return float(log_probs.gather(1, torch.tensor(tokens)[:, None]).mean())


@torch.no_grad()
def _log_probs(model, mel, tokens):
    """(tokens + 1, V) in one pass."""
    from omni_train.nn.cross_decoder import Spans

    state = model.prefill(torch.from_numpy(mel), torch.tensor([0, len(mel)]), 48)
    given = torch.tensor([START, *tokens])
    logits = model.audio_decoder(given, Spans([len(given)], given.device), state.encoder_output)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("likely_stop", [1.0, 1.6])
def test_a_beam_of_one_is_greedy_and_wider_beams_score_no_lower(distributed, likely_stop):
    beams = (1, 2, 5)
    found, by_hand, scores, in_pairs = distributed(1, searched, recognizer_recipe(), beams, likely_stop)[0]
    assert [one.tokens for one in found[1]] == by_hand
    for beam in beams:
        assert [one.score for one in found[beam]] == pytest.approx(scores[beam], abs=1e-4)
        assert all(wide >= greedy - 1e-5 for wide, greedy in zip(scores[beam], scores[1], strict=True))
    assert sum(scores[5]) > sum(scores[1])
    assert [one.tokens for one in in_pairs] == [one.tokens for one in found[5]]


def test_nothing_to_write_is_refused():
    from omni_train.rollout.transcribe import transcribe

    for beam, most in ((0, 5), (1, 0)):
        with pytest.raises(ValueError, match="both must be at least 1"):
            transcribe(None, [], window_frames=0, start_token=1, stop_token=2, max_new_tokens=most, beam=beam)


def heard_by_ctc(rank, world_size, recipe):
    """Best paths of clips together, and by hand of each alone; what a short batch gives."""
    from omni_train import platform
    from omni_train.rollout import transcribe as module

    model = build(recipe)
    mels = [one.mel[0] for one in utterances(recipe, CLIPS)]
    with torch.no_grad():
        # Blanks, repetitions, and words that a blank keeps apart, all of them likely.
        model.ctc_head.weight[:-4] = 0
        model.ctc_head.bias[:-4] = -torch.inf
        model.ctc_head.weight[-4:] *= 30
        model.train()
        found = module.transcribe_by_ctc(model, mels, window_frames=48)
        assert model.training
        model.eval()
        by_hand = []
        for mel in mels:
            hidden, _ = model.encode_audio(torch.from_numpy(mel), torch.tensor([0, len(mel)]), 48)
            path = model.ctc_head.bias + hidden @ model.ctc_head.weight.T
            by_hand.append(path.argmax(1).tolist())
    platform.parallel.destroy()
    return found, by_hand, model.ctc_head.blank


def test_the_ctc_head_writes_its_best_path_without_blanks_and_repetitions(distributed):
    found, paths, blank = distributed(1, heard_by_ctc, recognizer_recipe(ctc=True))[0]
    collapsed = [[one for one, _ in itertools.groupby(path) if one != blank] for path in paths]
    assert found == collapsed and any(blank in path for path in paths)
    assert any(len(words) > 1 for words in found)
    assert any(
        len([one for one in path if one != blank]) > len(words) for path, words in zip(paths, found, strict=True)
    )
