"""Held-out questions are read, answered and scored alike in every layout that generates."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.errors import UserError
from omni_train.recipe.schema import EvaluationConfig, ParallelConfig, SourceConfig
from tests.support.media import image_file, sound_file, tone
from tests.support.thinker import encoders, small_recipe

LANGUAGES = ("en", "zh")
COLORS = ("red", "green", "blue")


def chat(question: list, answer: str, **meta) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": meta}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Sources ``speech``, ``images``, ``text`` (documents, and one chat) and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    train(["red green blue what color is it in the beginning\n"] * 40, folder / "tokenizer", vocab_size=320)
    speech, images, text = [], [], []
    for n in range(7):
        heard = [{"type": "audio", "audio": "0.flac"}, {"type": "text", "text": "Write it down."}]
        fields = chat(heard, f"the {COLORS[n % 3]} one", task="transcribe", language=LANGUAGES[n % 2])
        sound = sound_file(tone(0.3 + 0.1 * n, hertz=200 + 50 * n))
        speech.append((f"s{n}", fields, {"0.flac": sound if n != 4 else b"not a sound"}))
        seen = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What color is it?"}]
        pixels = np.full((16, 24, 3), 30 * n, dtype=np.uint8)
        images.append((f"i{n}", chat(seen, COLORS[n % 3], task="color"), {"0.png": image_file(pixels)}))
        text.append((f"t{n}", {"text": "red green blue " * 9}))
    text[3] = ("t3", chat([{"type": "text", "text": "When?"}], "at 2.5 seconds", task="when"))
    for name, samples in (("speech", speech), ("images", images), ("text", text)):
        for split in ("train", "val"):
            write_shards(folder / name, split, [(f"{split}-{key}", *rest) for key, *rest in samples], shards=1)
        index_shards(folder / name)
    return folder


def recipe_for(world: Path, parallel=None, **changes):
    evaluation = EvaluationConfig(every=1, samples=6, max_new_tokens=7, print_samples=3)
    recipe = small_recipe(parallel, row_tokens=256, evaluation=evaluation, vocab_size=384, **encoders(), **changes)
    data = dataclasses.replace(
        recipe.data,
        tokenizer=str(world / "tokenizer"),
        sources=[SourceConfig(str(world / name)) for name in ("speech", "images", "text")],
        workers=0,
        streams=2,
    )
    data.media.image_min_pixels, data.media.audio_timestamp_seconds = 64, []
    return dataclasses.replace(recipe, data=data)


def test_questions_are_the_chats_of_the_first_samples_shared_among_the_ranks(world):
    from omni_train.data.rows.kinds import held_out

    recipe = recipe_for(world)

    def names(rank=0, ranks=1, refused=None):
        share = dict(data_rank=rank, data_world_size=ranks, refused=refused)
        found = held_out(recipe.data, recipe.model, recipe.evaluation, **share)
        return [question.name for question in found], found

    alone, together = Counter(), Counter()
    everything, questions = names(refused=alone)
    assert everything[:4] == ["speech/0", "images/0", "text/3", "speech/1"]
    assert len(everything) == 6 + 6 + 1 - 1  # a document is no question, and sample 4 no sound
    assert "speech/4" not in everything
    assert sorted(names(0, 2, together)[0] + names(1, 2, together)[0]) == sorted(everything)
    assert alone == together == {"audio_unreadable": 1}
    speech, image, text = questions[:3]
    assert (image.text, image.answer, image.meta["task"]) == ("What color is it?", "red", "color")
    assert [len(question.prompt.mel) for question in (speech, image, text)] == [1, 0, 0]
    assert [len(question.prompt.patches) for question in (speech, image, text)] == [0, 1, 0]
    assert [medium.kind for question in questions for medium, _ in question.media] == ["audio", "image"]


def test_a_split_without_chats_is_refused_in_one_line(world):
    from omni_train.data.rows.kinds import held_out

    recipe = recipe_for(world)
    recipe.data.sources = recipe.data.sources[2:]
    recipe.evaluation.samples = 3
    with pytest.raises(UserError, match=r"evaluation\.every=1: the first 3 samples of the val split .* no chat"):
        held_out(recipe.data, recipe.model, recipe.evaluation)


def answer(rank, world_size, world, parallel, checkpoint):
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model
    from omni_train.evaluation.answers import Answers
    from omni_train.recipe.schema import CheckpointConfig
    from omni_train.training.engines.megatron import MegatronEngine
    from omni_train.training.feed import Feed

    recipe = recipe_for(Path(world), parallel)
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    start = Path(checkpoint) / "step_00000000"
    if start.exists():
        load_model(engine.chunks, start, recipe.model)
    else:
        store = CheckpointStore(Path(checkpoint), CheckpointConfig(asynchronous=False), recipe.model)
        store.save(0, engine.chunks, engine.optimizer, {}, None)
        store.close()
    evaluated = Answers(recipe, *Feed(recipe).questions())(engine.network())
    assert all(module.training for chunk in engine.chunks for module in chunk.modules())
    platform.parallel.destroy()
    shown = [(prediction.question.name, prediction.answer) for prediction in evaluated.exhibits]
    return evaluated.metrics, shown


def test_every_layout_gives_the_same_answers_and_metrics(distributed, world, tmp_path):
    ((metrics, shown),) = distributed(1, answer, world, ParallelConfig(), tmp_path)
    assert [name for name, _ in shown] == ["speech/0", "images/0", "text/3"]
    assert metrics["eval_answers_color"] == 6
    assert metrics["eval_answers_transcribe"] == 5
    assert metrics["eval_answers_when"] == 1
    assert {"eval_wer_en", "eval_cer_en", "eval_cer_zh", "eval_exact_color", "eval_when_close"} <= set(metrics)
    assert "eval_wer_zh" not in metrics
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(expert=2)):
        results = distributed(2, answer, world, parallel, tmp_path)
        for found, _ in results:
            assert found == pytest.approx(metrics, rel=1e-6)
        assert results[0][1] == shown


def test_swapped_answers_are_the_same_chats_with_the_pictures_of_others(world):
    from omni_train.data.rows.questions import answer_rows

    recipe = recipe_for(world)
    recipe.data.sources = recipe.data.sources[1:2]

    def rows(swapped, rank=0, ranks=1):
        found = answer_rows(
            recipe.data, recipe.model, recipe.evaluation, swapped=swapped, data_rank=rank, data_world_size=ranks
        )
        return found, [row.patches.split(row.grid_thw.prod(-1).tolist()) for row in found]

    (own,), (mine,) = rows(False)
    (swapped,), (theirs,) = rows(True)
    assert own.samples == swapped.samples == 6
    assert own.tokens.equal(swapped.tokens) and own.labels.equal(swapped.labels)
    shades = [int(patches[0, 0]) // 30 for patches in mine]
    assert sorted(shades) == list(range(6))
    for shade, patches in zip(shades, theirs, strict=True):
        other = int(patches[0, 0]) // 30
        assert other == (shade + 1) % 6 and COLORS[other % 3] != COLORS[shade % 3]


def test_every_rank_has_as_many_rows_of_answers(world):
    from omni_train.data.rows.questions import answer_rows

    recipe = recipe_for(world)
    shares = [
        answer_rows(recipe.data, recipe.model, recipe.evaluation, swapped=True, data_rank=rank, data_world_size=4)
        for rank in range(4)
    ]
    assert len({len(share) for share in shares}) == 1
    # Sound 4 is broken: it costs the chat whose own it is, or the one that would take it.
    assert sum(row.samples for share in shares for row in share) == 5 + 6
