"""What of a recipe may change when a run goes on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace

import pytest

from omni_train.recipe.changes import KINDS, Kind, differences, kind_of
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.messages import recipe_keys
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


def test_every_key_of_the_recipe_is_decided_on_and_every_decision_is_of_a_key():
    assert {entry.name for entry in fields(Recipe)} <= KINDS.keys() <= set(recipe_keys())


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("seed", 7, Kind.kept),
        ("trainable", ["mtp.*"], Kind.kept),
        ("data.streams", 16, Kind.kept),
        ("data.row_tokens", 512, Kind.kept),
        ("data.tokenizer", "elsewhere", Kind.kept),
        ("data.media.video_fps", 1.0, Kind.kept),
        ("data.workers", 7, Kind.free),
        ("model.thinker.hidden_size", 48, Kind.kept),
        ("model.thinker.mtp_loss_weight", 0.3, Kind.learned),
        ("model.audio.train_window_frames", [0], Kind.learned),
        ("optimizer.name", "muon", Kind.kept),
        ("optimizer.lr", 0.5, Kind.learned),
        ("optimizer.clip_grad", 0.5, Kind.learned),
        ("schedule.steps", 99, Kind.free),
        ("parallel.tensor", 2, Kind.free),
        ("precision", Precision.bf16, Kind.learned),
        ("init_from", "elsewhere", Kind.kept),
    ],
)
def test_a_change_is_named_with_what_was_before_and_what_it_means(recipe, key, value, kind):
    before = recipe
    for name in key.split("."):
        before = getattr(before, name)
    assert changed(recipe, key, value) == [(key, before, value, kind)]


def test_the_longest_key_decides():
    assert kind_of("codec_training.discriminators.periods") is Kind.kept
    assert kind_of("codec_training.mel_weight") is Kind.learned


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
    assert [one.kind for one in differences(replace(recipe, model=fewer), recipe)] == [Kind.kept]


def test_zero_keeps_its_precision(recipe):
    recipe = replace(recipe, engine=EngineName.deepspeed)
    assert changed(recipe, "precision", Precision.bf16)[0][-1] is Kind.kept
