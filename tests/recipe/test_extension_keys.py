"""A network brings keys of its own: they are the recipe's as the built-in ones are."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
from omegaconf import OmegaConf

from omni_train.checkpoint.sharded import described, read_model_config
from omni_train.checkpoint.state_files import write_state
from omni_train.errors import UserError
from omni_train.recipe import networks
from omni_train.recipe.changes import differences
from omni_train.recipe.compose import load_recipe, read_recipe, used, write_recipe
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.help import page
from omni_train.recipe.keys import Change, key
from omni_train.recipe.networks import NetworkKeys, register
from omni_train.recipe.pipeline import with_sources
from omni_train.recipe.schema import DataConfig, EngineName, ModelConfig, OptimizerConfig, Recipe
from omni_train.recipe.validate import validate


@dataclass
class ToyConfig:
    """A part of a model that only this test knows."""

    width: int = key(8, ge=1, le=64, help="channels of the toy")
    gain: float = key(1.0, gt=0, resume=Change.learned, help="of its output")


@dataclass
class ToySettings:
    """How the toy learns."""

    patience: int = key(3, ge=0, resume=Change.free, help="steps that it waits")
    teacher: str | None = key(None, checkpoint=True, help="who shows it")


@dataclass
class ToyData:
    """What the toy makes of its rows."""

    shift: int = key(0, help="tokens that they are moved by")


TOY = NetworkKeys(
    name="toy",
    engines=(EngineName.megatron,),
    rows="chats",
    parts=("thinker", "toy"),
    optional_parts=("audio", "vision"),
    keys={"model.toy": ToyConfig, "toy": ToySettings, "data.toy": ToyData},
    check=lambda recipe: None,
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch, tmp_path):
    monkeypatch.setattr(networks, "_TABLE", dict(networks.registered()))
    register(TOY)
    (tmp_path / "own" / "stage").mkdir(parents=True)
    stage = "# @package _global_\nstage: toy\nnetwork: toy\noptimizer: {lr: 1.0e-3}\nmodel: {toy: {width: 4}}\n"
    (tmp_path / "own" / "stage" / "toy.yaml").write_text(stage)


@pytest.fixture
def composed(tmp_path):
    """What words give beside the toy's own stage."""
    return lambda *words: load_recipe(["stage=toy", *words], tmp_path / "own")


def test_its_keys_are_given_and_typed_like_any_other(composed):
    recipe = composed("toy.patience=5", "model.toy.gain=2")
    assert recipe.model.toy == ToyConfig(width=4, gain=2.0)
    assert recipe.toy == ToySettings(patience=5)
    assert recipe.data.toy == ToyData(shift=0)
    assert isinstance(recipe, Recipe) and isinstance(recipe.model, ModelConfig) and isinstance(recipe.data, DataConfig)
    assert type(recipe.optimizer) is OptimizerConfig
    validate(recipe, world_size=1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.toy.width=0", "model.toy.width=0: must be at least 1"),
        ("model.toy.width=65", "model.toy.width=65: must be at most 64"),
        ("toy.patience=-1", "toy.patience=-1: must be at least 0"),
        ("toy.patience=x", "toy.patience: Value 'x' of type 'str' could not be converted to Integer"),
        ("toy.patiense=1", "toy.patiense is not a key of the recipe; did you mean toy.patience?"),
        ("patience=1", "patience is not a key of the recipe; did you mean toy.patience?"),
        ("model.toy=null", "network=toy: model=tiny has no model.toy; choose a model with it"),
    ],
)
def test_what_is_wrong_with_them_is_refused_in_one_line(composed, word, message):
    with pytest.raises(UserError) as error:
        validate(composed(word), world_size=1)
    assert str(error.value) == message


def test_a_run_of_another_network_has_none_of_them(composed):
    recipe = composed("network=thinker", "model.toy.width=0", "toy.patience=-1")
    assert recipe.model.toy is None
    shown = used(OmegaConf.structured(recipe))
    assert not [name for name in ("toy", "model.toy", "data.toy") if OmegaConf.select(shown, name) is not None]
    validate(recipe, world_size=1)
    assert not list(differences(replace(recipe, toy=ToySettings(patience=9)), recipe))


def test_what_a_change_of_them_means_is_said_by_the_key(composed):
    before = composed()
    now = composed("model.toy.width=5", "model.toy.gain=3", "toy.patience=9")
    assert {one.key: one.kind for one in differences(now, before)} == {
        "model.toy.width": Change.kept,
        "model.toy.gain": Change.learned,
        "toy.patience": Change.free,
    }


def test_help_has_them():
    assert "model.toy.width=8  (integer, at least 1, at most 64)\n      channels of the toy" in page("model.toy")
    assert "model.toy" in page("model")
    assert "steps that it waits" in page("toy")


def test_a_checkpoint_that_they_name_is_one(composed):
    recipe = composed("toy.teacher=first", "init_from=first")
    moved = with_sources(recipe, lambda source: f"runs/{source}")
    assert (moved.toy.teacher, moved.init_from) == ("runs/first", "runs/first")
    assert type(moved) is recipe_type()


def test_the_recipe_is_written_and_read_and_travels_to_other_processes(composed, tmp_path):
    recipe = composed("toy.patience=5")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe == deepcopy(recipe)
    assert type(again) is type(recipe) and type(again.model) is type(recipe.model)


def test_a_run_of_another_network_can_be_read_without_them(tmp_path, monkeypatch):
    recipe = load_recipe()
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    monkeypatch.delitem(networks._TABLE, "toy")
    assert read_recipe(tmp_path / "recipe.yaml") == load_recipe()


def test_a_checkpoint_says_them(composed, tmp_path):
    model = composed().model
    write_state(tmp_path / "model.pt", described(model))
    assert read_model_config(tmp_path) == model


def test_a_name_that_is_taken_is_refused():
    for group in ("data", "model.audio", "toy"):
        with pytest.raises(ValueError, match=f"network other: the recipe has a {group} already"):
            register(replace(TOY, name="other", keys={group: ToyConfig}))


def test_without_them_the_recipe_is_the_schemas(monkeypatch):
    assert recipe_type() is not Recipe
    monkeypatch.delitem(networks._TABLE, "toy")
    assert recipe_type() is Recipe


def test_a_plugin_that_the_environment_names_brings_its_keys(tmp_path):
    (tmp_path / "toys.py").write_text(
        "from dataclasses import dataclass\n"
        "from omni_train.recipe.keys import key\n"
        "from omni_train.recipe.networks import NetworkKeys, register\n"
        "@dataclass\n"
        "class Toy:\n"
        "    'A toy.'\n"
        "    width: int = key(8, ge=1, help='channels of the toy')\n"
        "register(NetworkKeys(name='toy', engines=('megatron',), rows='chats', parts=(), keys={'model.toy': Toy},"
        " check=print))\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "omni_train", "train", "--help", "model.toy"],
        env=os.environ | {"OMNI_TRAIN_PLUGINS": "toys", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout.endswith("  model.toy.width=8  (integer, at least 1)\n      channels of the toy\n"), done.stderr


def test_a_part_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match=r"network toyy: there is no model\.toyy"):
        register(replace(TOY, name="toyy", parts=("toyy",), keys={}))
