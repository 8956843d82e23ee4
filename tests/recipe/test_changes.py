"""What of a recipe may change when a run goes on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest

from omni_train.recipe.changes import differences
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.keys import Change, described
from omni_train.recipe.schema import EngineName, Precision, Recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe()


def changed(recipe: Recipe, key: str, value) -> list[tuple]:
    now = deepcopy(recipe)
    *path, name = key.split(".")
    inner = now
    for step in path:
        inner = getattr(inner, step)
    setattr(inner, name, value)
    return [tuple(one) for one in differences(now, recipe)]


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("seed", 7, Change.kept),
        ("trainable", ["mtp.*"], Change.kept),
        ("data.streams", 16, Change.kept),
        ("data.row_tokens", 512, Change.kept),
        ("data.tokenizer", "elsewhere", Change.kept),
        ("data.media.video_fps", 1.0, Change.kept),
        ("data.workers", 7, Change.free),
        ("model.thinker.hidden_size", 48, Change.kept),
        ("model.thinker.mtp_loss_weight", 0.3, Change.learned),
        ("model.audio.train_window_frames", [0], Change.learned),
        ("optimizer.name", "muon", Change.kept),
        ("optimizer.lr", 0.5, Change.learned),
        ("optimizer.clip_grad", 0.5, Change.learned),
        ("schedule.steps", 99, Change.free),
        ("parallel.tensor", 2, Change.free),
        ("precision", Precision.bf16, Change.learned),
        ("init_from", "elsewhere", Change.kept),
    ],
)
def test_a_change_is_named_with_what_was_before_and_what_it_means(recipe, key, value, kind):
    before = recipe
    for name in key.split("."):
        before = getattr(before, name)
    assert changed(recipe, key, value) == [(key, before, value, kind)]


def test_a_key_is_as_its_group_unless_it_says_otherwise():
    keys = described(Recipe)
    assert keys["codec_training.mel_weight"].change is keys["codec_training"].change is Change.learned
    assert keys["codec_training.discriminators.periods"].change is Change.kept
    assert keys["recognition.beam"].change is Change.free


def test_what_the_network_does_not_use_is_not_compared(recipe):
    assert not changed(recipe, "recognition.ctc_weight", 0.3)
    assert not changed(recipe, "zero.stage", 3)
    listens = replace(recipe, network="recognizer", engine=EngineName.deepspeed)
    assert [one[0] for one in changed(listens, "recognition.ctc_weight", 0.3)] == ["recognition.ctc_weight"]
    assert [one[0] for one in changed(listens, "zero.stage", 3)] == ["zero.stage"]


def test_a_run_that_was_moved_or_that_drops_what_it_started_from_has_not_changed(recipe):
    started = replace(recipe, init_from="runs/x", init_parts={"audio_*": "random"})
    assert not list(differences(replace(recipe, run="moved", runs_dir="/elsewhere"), started))
    assert [one.key for one in differences(replace(started, init_parts={"mtp.*": "random"}), started)] == ["init_parts"]


def test_layers_may_be_written_otherwise(recipe):
    model = recipe.model
    layers = "|".join([model.thinker.pattern] * model.thinker.repeats)
    whole = replace(model, thinker=replace(model.thinker, pattern=layers, repeats=1))
    assert not list(differences(replace(recipe, model=whole), recipe))
    fewer = replace(model, thinker=replace(model.thinker, pattern=model.thinker.pattern[:-2]))
    assert [one.kind for one in differences(replace(recipe, model=fewer), recipe)] == [Change.kept]


def test_zero_keeps_its_precision(recipe):
    recipe = replace(recipe, engine=EngineName.deepspeed)
    assert changed(recipe, "precision", Precision.bf16)[0][-1] is Change.kept
