"""A run that answers held-out questions as it goes."""

from __future__ import annotations

import numpy as np

from omni_train.data_pipelines.shards import index_shards, write_shards
from tests.support.media import image_file, sound_file, tone


def ask(key: str, kind: str, file: str, data: bytes, answer: str, task: str) -> tuple:
    question = [{"type": kind, kind: file}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return key, {"messages": messages, "meta": {"task": task, "language": "en"}}, {file: data}


def test_figures_are_logged_and_answers_shown_beside_their_media(runs):
    runs.encoders = True
    folder = runs.folder / "questions"
    for split, count in (("train", 40), ("val", 6)):
        pixels = [np.full((32, 32, 3), 40 * n % 256, dtype=np.uint8) for n in range(count)]
        images = [ask(f"{split}-i{n}", "image", "0.png", image_file(p), "red", "color") for n, p in enumerate(pixels)]
        sounds = [sound_file(tone(0.5, hertz=200 + 9 * n)) for n in range(count)]
        speech = [ask(f"{split}-s{n}", "audio", "0.flac", s, "mo ri", "transcribe") for n, s in enumerate(sounds)]
        write_shards(folder, split, [sample for pair in zip(images, speech, strict=True) for sample in pair], shards=1)
    index_shards(folder)
    err = runs.finish(
        "run=asked",
        f"data.path={folder}",
        "data.media.image_min_pixels=1024",
        "schedule.steps=4",
        "schedule.log_every=3",
        "evaluation.every=2",
        "evaluation.samples=5",
        "evaluation.max_new_tokens=6",
        "evaluation.print_samples=2",
        "tracking=wandb_offline",
    )
    metrics = {line["step"]: line for line in runs.metrics("asked")}
    assert list(metrics) == [2, 3, 4]
    for step in (2, 4):
        assert metrics[step]["eval_answers_color"] + metrics[step]["eval_answers_transcribe"] == 5
        assert {"eval_exact_color", "eval_wer_en", "eval_cer_en"} <= set(metrics[step])
    shown = [line for line in err.splitlines() if "'What is it?' ->" in line]
    assert len(shown) == 4
    assert any("<image>" in line and "(expected 'red')" in line for line in shown)
    tables = list((runs.folder / "asked").rglob("predictions*.table.json"))
    assert tables
    columns = ["name", "task", "audio", "image", "video", "question", "expected", "answer"]
    assert all(column in tables[0].read_text() for column in columns)
    media = list((runs.folder / "asked" / "questions").rglob("0.*"))
    assert sorted(path.suffix for path in media) == [".flac", ".png"]
    # What waits to be sent stays with the run, the media included.
    waiting = [path for path in (runs.folder / "asked" / "wandb" / "artifacts").rglob("*") if path.is_file()]
    assert {path.read_bytes() for path in media} <= {path.read_bytes() for path in waiting}
