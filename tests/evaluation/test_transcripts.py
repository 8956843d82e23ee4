"""Held-out clips are transcribed whole and in windows, and the metrics are those of all data ranks together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.recipe.schema import EvaluationConfig, RecognitionConfig, SourceConfig
from tests.support.media import sound_file, tone
from tests.support.recognizer import build, recognizer_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    train(["red green blue the one\n", "en\nzh\n"] * 40, folder / "tokenizer", vocab_size=320)
    samples = []
    for n in range(7):
        question = [{"type": "audio", "audio": "0.wav"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"the red one {n}"}]
        meta = {"language": ("en_US", "ZH")[n % 2]}
        sound = sound_file(tone(0.3 + 0.3 * n, hertz=200 + 50 * n), format="WAV")
        samples.append((f"s{n}", {"messages": messages, "meta": meta}, {"0.wav": sound}))
    for split in ("train", "val"):
        write_shards(folder / "speech", split, [(f"{split}-{key}", *rest) for key, *rest in samples], shards=1)
    index_shards(folder / "speech")
    return folder


def evaluate(rank, world_size, world):
    from omni_train import platform
    from omni_train.data.rows.kinds import held_out
    from omni_train.evaluation.transcripts import Transcripts

    recipe = recognizer_recipe(
        vocab_size=384,
        evaluation=EvaluationConfig(every=1, samples=6, max_new_tokens=7, print_samples=2),
        recognition=RecognitionConfig(eval_windows=[48]),
    )
    sources = [SourceConfig(str(Path(world) / "speech"))]
    recipe.data = dataclasses.replace(
        recipe.data, rows="transcripts", tokenizer=str(Path(world) / "tokenizer"), sources=sources
    )
    model = build(recipe).train()

    questions = held_out(recipe.data, recipe.model, recipe.evaluation, data_rank=rank, data_world_size=world_size)
    evaluated = Transcripts(recipe, questions, Counter(no_audio=rank + 1))(model)
    assert model.training
    platform.parallel.destroy()
    shown = [(prediction.question.name, prediction.answer) for prediction in evaluated.exhibits]
    return evaluated.metrics, shown


def test_figures_are_the_same_on_any_number_of_ranks_and_tell_the_windows_apart(distributed, world):
    ((metrics, shown),) = distributed(1, evaluate, world)
    assert [name for name, _ in shown] == ["speech/0", "speech/1"]
    assert metrics.pop("eval_skipped_no_audio") == metrics.pop("eval_skipped_no_audio_window_48") == 1
    whole = {"answers_transcribe", "cer", "cer_en", "cer_zh", "language", "wer", "wer_en"}
    assert set(metrics) == {f"eval_{name}{window}" for name in whole for window in ("", "_window_48")}
    assert metrics["eval_answers_transcribe"] == 6
    assert metrics["eval_wer"] == metrics["eval_wer_en"]  # the other language has no words
    low, high = sorted((metrics["eval_cer_en"], metrics["eval_cer_zh"]))
    assert low <= metrics["eval_cer"] <= high
    for found, _ in distributed(2, evaluate, world):
        assert found.pop("eval_skipped_no_audio") == found.pop("eval_skipped_no_audio_window_48") == 1 + 2
        assert found == pytest.approx(metrics, rel=1e-6)
