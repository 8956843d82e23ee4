"""Scores of a sample's speech, with and without a recognizer."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.data_pipelines.strata import Speech
from omni_train.errors import UserError
from omni_train.evaluation.strata import QualityJudge, error_rate, write_strata
from omni_train.recipe.schema import QualityConfig
from tests.data_pipelines.test_codes import files_of
from tests.support.media import sound_file
from tests.support.recognizer import recognizer_recipe, write_recognizer

RATE = 24000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "tokenizer"
    train(["red green blue the one\n", "en\nzh\n"] * 40, folder, vocab_size=320)
    return folder


def hum(seconds: float) -> np.ndarray:
    generator = np.random.default_rng(3)
    return (
        0.1 * np.sin(np.arange(round(seconds * RATE)) * 0.05) + 0.01 * generator.standard_normal(round(seconds * RATE))
    ).astype(np.float32)


def test_scores_are_those_that_recipes_know_and_say_why_one_is_missing(tokenizer):
    judge = QualityJudge(tokenizer, None)
    text = "red green blue"
    found = judge(Speech(hum(1.1), RATE, text, {}))
    assert found.keys() == {field.name for field in dataclasses.fields(QualityConfig)} - {"error_rate"}
    assert found["seconds_per_token"] == pytest.approx(1.1 / len(Tokenizer(tokenizer).encode(text)))
    assert (found["clipping"], found["silence"]) == (0, 0)
    short = judge(Speech(np.zeros(480, np.float32), RATE, None, {}))
    assert (short["snr_db"], short["dnsmos"], short["silence"]) == ("silent_or_too_short",) * 2 + (1.0,)
    assert (short["seconds"], short["seconds_per_token"]) == (0.02, "no_text")
    assert QualityJudge(None, None)(Speech(hum(0.05), RATE, text, {}))["seconds_per_token"] == "no_tokenizer"


@pytest.mark.parametrize(
    ("text", "transcript", "language", "expected"),
    [
        ("The red house", "the read house.", "en", 1 / 3),
        ("红色的房子", "红色房子", "zh", 1 / 5),
        ("red house", "", None, 1.0),
        ("…", "red", "en", "no_words"),
    ],
)
def test_errors_are_of_words_or_else_of_characters(text, transcript, language, expected):
    found = error_rate(text, transcript, {"language": language, "task": "speak"})
    assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


def listen(rank, world_size, folder):
    from omni_train import platform
    from omni_train.frozen import recognizer

    recipe = recognizer_recipe(vocab_size=384)
    write_recognizer(recipe, Path(folder, "step_00000001"))
    platform.parallel.destroy()
    recognizer.LONGEST_TRANSCRIPT = 5
    judge = QualityJudge(Path(folder, "tokenizer"), str(Path(folder, "step_00000001")))
    speech = Speech(hum(0.7), RATE, "red green", {"language": "en"})
    scores, hash_ = judge(speech), judge.settings["recognizer"]
    (heard,) = judge.recognizer.transcribe([soxr.resample(hum(0.7), RATE, 16000)])
    platform.parallel.destroy()
    write_recognizer(recognizer_recipe(vocab_size=192), Path(folder, "step_00000002"))
    platform.parallel.destroy()
    with pytest.raises(UserError, match=r"has \d+ tokens, more than the 192 of"):
        QualityJudge(Path(folder, "tokenizer"), str(Path(folder, "step_00000002")))
    platform.parallel.destroy()
    return scores, hash_, error_rate("red green", heard, {"language": "en"})


def test_a_recognizer_gives_an_error_rate(distributed, tokenizer):
    ((scores, hash_, expected),) = distributed(1, listen, str(tokenizer.parent))
    assert len(hash_) == 64
    assert scores["error_rate"] == expected > 0


def test_a_recognizer_without_a_tokenizer_is_refused():
    with pytest.raises(UserError, match="recognizer= needs the tokenizer"):
        QualityJudge(None, "step_00000001")


def test_the_command_scores_a_folder(tmp_path, tokenizer):
    wave = hum(0.8)
    samples = [("a", {"text": "red green", "speech": "0.wav"}, {"0.wav": sound_file(wave[:, None], RATE, "WAV")})]
    write_shards(tmp_path / "speech", "train", samples, 1)
    index_shards(tmp_path / "speech")
    write_strata(tmp_path / "speech", workers=1)
    (parts,) = files_of(tmp_path / "speech_strata", "train").values()
    quality = json.loads(parts["json"])["meta"]["quality"]
    read, _ = soundfile.read(io.BytesIO(parts["0.wav"]), dtype="float32")
    expected = QualityJudge(None, None)(Speech(read, RATE, "red green", {}))
    assert quality == {name: round(value, 4) for name, value in expected.items() if not isinstance(value, str)}
