"""Which settings decide the states of a sample: with others, states that were written are refused by their name."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from omni_train.data.rows.stored_states import check_states, settings_of
from omni_train.errors import UserError
from omni_train.recipe.schema import ChatTemplate, Context, Precision, TalkerStyle
from tests.support.spoken_shards import spoken_recipe

THINKER = "ab" * 32


@pytest.fixture
def recipe(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    recipe = spoken_recipe(tmp_path)
    settings = settings_of(recipe)
    for source in ("talk", "read"):
        (tmp_path / source).mkdir()
        shards = {"train-00000.tar": THINKER}
        record = {"thinker": THINKER, "checkpoint": None, "settings": settings, "shards": shards}
        (tmp_path / source / "states.json").write_text(json.dumps(record))
    return recipe


CHANGES = {
    "model.talker.style=dual_track": lambda one: setattr(one.model.talker, "style", TalkerStyle.dual_track),
    "model.talker.accept_hidden_layer=3": lambda one: setattr(one.model.talker, "accept_hidden_layer", 3),
    "data.speech.context=media": lambda one: setattr(one.data.speech, "context", Context.media),
    "data.speech.max_media_positions=4": lambda one: setattr(one.data.speech, "max_media_positions", 4),
    "data.chat_template=qwen3_5": lambda one: setattr(one.data, "chat_template", ChatTemplate.qwen3_5),
    "data.row_tokens=512": lambda one: setattr(one.data, "row_tokens", 512),
    "data.media.video_fps=1.0": lambda one: setattr(one.data.media, "video_fps", 1.0),
    "model.audio.eval_window_frames=96": lambda one: setattr(one.model.audio, "eval_window_frames", 96),
    "model.vision.depth=null": lambda one: setattr(one.model, "vision", None),
    "precision=bf16": lambda one: setattr(one, "precision", Precision.bf16),
}


def test_states_of_the_recipe_are_taken(recipe):
    check_states(recipe, THINKER)
    recipe.data.media.max_audio_seconds = 7.0  # which refuses samples and changes none
    recipe.data.workers, recipe.data.alignment = 3, 16
    check_states(recipe, THINKER)


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_is_named(recipe, change):
    CHANGES[change](recipe)
    key, _, value = change.partition("=")
    if value == "null":
        key, value = r"model\.vision\.\w+", "null"
    else:
        key = re.escape(key)
    with pytest.raises(UserError, match=rf"^{key}={value}: the states in \S+ were made with \S+; set that, or make"):
        check_states(recipe, THINKER)


def test_another_tokenizer_is_refused(recipe):
    with open(f"{recipe.data.tokenizer}/tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"^data\.tokenizer=\w{12}…: the states in \S+ were made with \w{12}…"):
        check_states(recipe, THINKER)


def test_another_thinker_and_a_shard_of_another_are_refused(recipe, tmp_path):
    with pytest.raises(UserError, match=r"the states in \S+/talk are of another Thinker, abab\S+ and not cdcd"):
        check_states(recipe, "cd" * 32)
    file = tmp_path / "read" / "states.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"shards": {"train-00000.tar": "ef" * 32}}))
    with pytest.raises(UserError, match=r"the states in \S+/read/train-00000.tar are of another Thinker, efef"):
        check_states(recipe, THINKER)


@pytest.mark.parametrize("text", ["", "[]", '{"thinker": 3}', "{"])
def test_a_source_without_states_is_told_the_command(recipe, tmp_path, text):
    (tmp_path / "talk" / "states.json").write_text(text)
    with pytest.raises(UserError, match=r"talk has no states; make them with `omni-train data states out=DIR"):
        check_states(recipe, THINKER)
