"""Recipes and checkpoints from before the model's keys were nested are read as what they mean."""

from __future__ import annotations

import yaml

from omni_train.checkpoint.sharded import described, read_model_config
from omni_train.checkpoint.state_files import write_state
from omni_train.recipe.compose import load_recipe, read_recipe, write_recipe


def flat(model: dict) -> dict:
    """As it was written when the Thinker's keys stood beside the other parts."""
    return {key: value for key, value in model.items() if key != "thinker"} | model["thinker"]


def test_an_old_runs_recipe_is_the_same_recipe(tmp_path):
    recipe = load_recipe(["model=tiny", "run=old"])
    write_recipe(recipe, tmp_path / "recipe.yaml")
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    written["model"] = flat(written["model"])
    assert written["model"]["num_experts"] == 8
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(written))
    assert read_recipe(tmp_path / "old.yaml") == recipe


def test_an_old_runs_codec_has_no_thinker(tmp_path):
    recipe = load_recipe(["stage=codec", "model=tiny", "data=rehearsal_crops", "run=old"])
    assert recipe.model.thinker is None
    write_recipe(recipe, tmp_path / "recipe.yaml")
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    thinker = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["model"]
    whole = load_recipe(["model=tiny", "run=old"]).model
    known = {name: value for name, value in described(whole).items() if not name.startswith("talker")}
    written["model"] = flat(known | {"codec": thinker["codec"], "code2wav": thinker["code2wav"]})
    del written["model"]["layers"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(written))
    assert read_recipe(tmp_path / "old.yaml") == recipe


def test_an_old_checkpoints_model_is_the_same_model(tmp_path):
    model = load_recipe(["model=tiny"]).model
    write_state(tmp_path / "model.pt", flat(described(model)))
    assert read_model_config(tmp_path) == model
