"""Held-out speech said again: measured, counted over ranks, and kept to hear and to see."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni_train.data.rows.kinds import held_out
from omni_train.data.rows.utterances import Utterance
from omni_train.data_pipelines.rehearsal import tokenizer as rehearsal_tokenizer
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.evaluation.resynthesis import Resyntheses, pesq, stoi
from omni_train.models.codec import SpeechCodec
from omni_train.recipe.schema import DataConfig, EvaluationConfig, Recipe, SourceConfig
from omni_train.rollout.scoring import Tally
from tests.support.codec import CODE2WAV, CODEC, FRAME, MODEL, TRAINING, voice
from tests.support.media import sound_file

UTTERANCES = 5
SAMPLES = [15000 + 1370 * n for n in range(UTTERANCES)]  # 0.6 s and more


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    root = tmp_path_factory.mktemp("speech")
    rehearsal_tokenizer.train(["what is said here"], root / "tokenizer", 270)
    samples = []
    for n, length in enumerate(SAMPLES):
        heard = {"role": "user", "content": [{"type": "audio", "audio": "0.flac"}]}
        fields = {"messages": [heard, {"role": "assistant", "content": f"word {n}"}]}
        fields["meta"] = {"task": "transcribe", "language": "en"}
        files = {"0.flac": sound_file(voice(length, n).numpy()[:, None], 24000)}
        samples.append((f"s-{n:03d}", fields, files))
    samples.insert(1, ("s-101", fields, {"0.flac": b"fLaC no sound"}))
    samples.append(("s-102", {"messages": 7}))
    write_shards(root / "shards", "val", samples, 1)
    index_shards(root / "shards")
    data = DataConfig(
        name="speech",
        path="unused",
        sources=[SourceConfig(str(root / "shards"))],
        tokenizer=str(root / "tokenizer"),
        rows="crops",
        row_tokens=8,
        crop_seconds=4 * FRAME / 24000,
    )
    return Recipe(
        network="codec",
        model=MODEL,
        data=data,
        codec_training=TRAINING,
        evaluation=EvaluationConfig(every=1, samples=20, print_samples=3),
    )


def transcribe(waveforms: list[np.ndarray]) -> list[str]:
    """Hears the third utterance, whose length it knows, and nothing else."""
    return ["Word 2" if abs(len(each) - SAMPLES[2] * 2 / 3) < 2 else "" for each in waveforms]


class Parrot(SpeechCodec):
    """Says again exactly what it heard, one code at a time."""

    def encode(self, waveform, num_quantizers=None, state=None):
        self.heard = waveform
        frames = -(-waveform.shape[1] // FRAME)
        return torch.stack([torch.arange(frames) % (number + 2) for number in range(4)])[None]

    def decode(self, codes, state=None):
        return self.heard


def evaluated(rank, world_size, recipe: Recipe, directory, parrot: bool):
    from omni_train import platform

    platform.parallel.initialize(recipe.parallel, recipe.seed)
    torch.manual_seed(3)
    codec = (Parrot if parrot else SpeechCodec)(CODEC, CODE2WAV).eval()
    refused = Counter()
    share = dict(data_rank=platform.parallel.data_rank(), data_world_size=world_size, refused=refused)
    utterances = held_out(recipe.data, recipe.model, recipe.evaluation, **share)
    result = Resyntheses(recipe, utterances, refused, directory, transcribe)(codec)
    platform.parallel.destroy()
    return result.metrics, result.exhibits


def test_a_codec_that_repeats_what_it_heard_is_perfect(distributed, recipe, tmp_path):
    ((metrics, kept),) = distributed(1, evaluated, recipe, tmp_path, True)
    assert metrics["eval_utterances"] == UTTERANCES
    assert metrics["eval_skipped_audio_unreadable"] == metrics["eval_skipped_unknown_schema"] == 1
    assert metrics["eval_mel_distance"] == 0
    assert metrics["eval_stoi"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["eval_stoi_failed"] == 0
    assert metrics["eval_codebook_used_00"] == pytest.approx(2 / 14)
    assert metrics["eval_codebook_perplexity_03"] == pytest.approx(5.0, abs=0.01)
    assert metrics["eval_codebook_used_least"] == pytest.approx(2 / 14)
    for side in ("original", "resynthesis"):  # one of five is right in both words
        assert metrics[f"eval_{side}_wer_en"] == pytest.approx(4 / 5)
    for number, pair in enumerate(kept):
        original, rate = soundfile.read(pair.original)
        resynthesis, _ = soundfile.read(pair.resynthesis)
        assert rate == 24000
        np.testing.assert_array_equal(original, resynthesis)
        np.testing.assert_allclose(original, voice(SAMPLES[number], number).numpy(), atol=1e-4)
        assert Image.open(pair.spectrograms).width > 500
        assert pair.text == f"word {number}"
    assert len(kept) == 3


def test_ranks_share_the_utterances_and_agree(distributed, recipe, tmp_path):
    ((alone, _),) = distributed(1, evaluated, recipe, tmp_path / "one", False)
    (first, kept), (second, none) = distributed(2, evaluated, recipe, tmp_path / "two", False)
    assert first == second == pytest.approx(alone, rel=1e-4)
    assert alone["eval_utterances"] == UTTERANCES
    assert alone["eval_stoi"] < 0.9
    assert (len(kept), none) == (3, [])


def test_what_cannot_be_measured_is_counted_and_nothing_fails():
    short, silent = voice(3000, 1).numpy(), np.zeros(24000, dtype=np.float32)
    spoken = voice(24000, 2).numpy()
    assert stoi(short, short, 24000) is None
    assert pesq(short[:2000], short[:2000], 24000) is None
    assert pesq(silent, silent, 24000) is None
    assert stoi(spoken, silent, 24000) is None or stoi(spoken, silent, 24000) < 0.1
    assert stoi(spoken, spoken, 24000) == pytest.approx(1.0, abs=1e-6)
    pytest.importorskip("pesq", reason="PESQ needs the extra [pesq]")
    assert pesq(spoken, spoken, 24000) > 4


def test_a_missing_pesq_is_said_and_not_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pesq", None)
    spoken = voice(24000, 2).numpy()
    assert pesq(spoken, spoken, 24000) is None
    assert pesq(spoken, spoken, 24000) is None
    assert capsys.readouterr().err.count("the package pesq is not installed") == 1


def test_utterances_of_unknown_text_are_not_recognized():
    evaluation = object.__new__(Resyntheses)
    evaluation.utterances = [Utterance("a/0", voice(9000, 1).numpy(), None, {})]
    evaluation.rate, evaluation.transcribe = 24000, transcribe
    tally = Tally()
    evaluation._recognize(tally, [(evaluation.utterances[0].waveform,) * 2])
    assert tally.metrics() == {}
