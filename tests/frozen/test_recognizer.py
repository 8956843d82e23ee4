"""A recognizer's checkpoint that listens to the codec: its features, its transcripts, and what is no recognizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.recipe.schema import RecognizerHead
from tests.support.media import tone
from tests.support.pool import RankFailed
from tests.support.recognizer import recognizer_recipe, write_recognizer


def listen(rank, world_size, folder, no_recognizer=False, head=RecognizerHead.decoder, ctc=False):
    """Features and transcripts of three clips by a listener, and the features that its recognizer gives."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import described
    from omni_train.data.samples.features.mel import log_mel
    from omni_train.frozen.recognizer import FrozenRecognizer

    recipe = recognizer_recipe(vocab_size=384, ctc=ctc)
    recipe.data = dataclasses.replace(recipe.data, tokenizer=str(Path(folder) / "tokenizer"))
    recipe.evaluation.max_new_tokens, recipe.evaluation.recognizer_head = 5, head
    checkpoint = Path(folder, f"step_0000000{int(no_recognizer)}")
    written = write_recognizer(recipe, checkpoint)
    if no_recognizer:
        torch.save(described(dataclasses.replace(recipe.model, recognizer=None)), checkpoint / "model.pt")
    listener = FrozenRecognizer(checkpoint, recipe)
    assert all(torch.equal(tensor, written[key]) for key, tensor in listener.model.named_parameters())
    clips = [tone(seconds, hertz=300 * seconds).astype(np.float32).reshape(-1) for seconds in (0.9, 0.05, 0.4)]
    features = listener(list(map(torch.from_numpy, clips)))
    sound = torch.from_numpy(clips[2]).requires_grad_()
    listener([torch.from_numpy(clips[0]), sound])[1].sum().backward()
    assert sound.grad.isfinite().all() and sound.grad.any()
    assert all(parameter.grad is None for parameter in listener.model.parameters())
    mel = torch.from_numpy(log_mel(clips[0], recipe.model.audio.num_mel_bins))
    with torch.no_grad():
        alone, _ = listener.model.encode_audio(mel, torch.tensor([0, len(mel)], dtype=torch.int32), 0)
    texts = listener.transcribe(clips)
    if ctc:  # written anew by a head that hears one word in everything
        with torch.no_grad():
            listener.model.ctc_head.bias[listener.tokenizer.encode("red")[0]] = 1e4
        texts = listener.transcribe(clips)
    platform.parallel.destroy()
    return features, alone, texts, listener.rate, listener.size


@pytest.fixture
def folder(tmp_path) -> Path:
    train(["red green blue the one\n", "en\nzh\n"] * 40, tmp_path / "tokenizer", vocab_size=320)
    return tmp_path


def test_a_listener_hears_what_its_recognizer_hears(distributed, folder):
    ((features, alone, texts, rate, size),) = distributed(1, listen, folder)
    assert features.shape[0] == len(texts) == 3
    assert features.shape[2] == size == alone.shape[1]
    torch.testing.assert_close(features[0, : len(alone)], alone, rtol=1e-5, atol=1e-6)
    assert rate == 6.25
    assert not features.requires_grad
    assert features[1, -1].abs().max() == 0  # a short clip ends before the longest


def test_what_is_no_recognizer_is_refused_in_one_line(distributed, folder):
    with pytest.raises(RankFailed, match=r"UserError: \S+: no recognizer; evaluation.recognizer is a checkpoint"):
        distributed(1, listen, folder, True)


def test_the_ctc_head_writes_where_it_is_asked_to(distributed, folder):
    ((_, _, texts, _, _),) = distributed(1, listen, folder, False, RecognizerHead.ctc, True)
    assert texts == ["red"] * 3


def test_a_recognizer_without_the_head_that_is_to_write_is_refused(distributed, folder):
    with pytest.raises(RankFailed, match=r"UserError: \S+: no CTC head; set evaluation.recognizer_head=decoder"):
        distributed(1, listen, folder, False, RecognizerHead.ctc)
