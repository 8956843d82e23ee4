"""Pipelines compose: words of all stages and of one, and where each stage starts from."""

from __future__ import annotations

import re

import pytest
import yaml

from omni_train.commands import DATA
from omni_train.errors import UserError
from omni_train.recipe.compose import recipes_dir
from omni_train.recipe.pipeline import load_pipeline, run

NAMES = sorted(path.stem for path in (recipes_dir() / "pipeline").glob("*.yaml"))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> str:
    """The word that names a pipeline `three` in a file of its own."""
    stages = {
        "text": ["stage=text_pretrain", "seed=2", "optimizer.lr=0.5"],
        "s1_audio_adapter": ["data=rehearsal_audio"],
        "last": ["stage=s2_general", "init_from=text", "init_parts={audio_*:s1_audio_adapter,vision_*:random}"],
    }
    path = tmp_path_factory.mktemp("pipelines") / "three.yaml"
    shared = ["schedule=smoke", "seed=1", "parallel.tensor=2"]
    path.write_text(yaml.safe_dump({"all": shared, "stages": stages}, sort_keys=False))
    return f"name={path}"


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_composes_and_every_stage_starts_from_another(name):
    pipeline = load_pipeline([f"name={name}"], world_size=2, commands=DATA)
    before: dict[str, str] = {}
    for stage, recipe in pipeline.recipes.items():
        if recipe.network not in before.values():
            ours = (recipe.init_from or "").startswith(f"runs/{name}/")
            assert not ours  # the first of its network begins anew, or with what another pipeline made
        else:
            assert recipe.init_from in [f"runs/{name}/{one}" for one in before if before[one] == recipe.network]
        before[stage] = recipe.network


def test_a_stage_starts_from_the_one_before_or_from_what_it_names(three):
    stages = load_pipeline([three, "run=mine", "runs_dir=/r"], 2).stages
    assert [recipe.init_from for recipe in stages.values()] == [None, "/r/mine/text", "/r/mine/text"]
    assert stages["last"].init_parts == {"audio_*": "/r/mine/s1_audio_adapter", "vision_*": "random"}
    assert [recipe.stage for recipe in stages.values()] == ["text_pretrain", "s1_audio_adapter", "s2_general"]
    assert [recipe.run for recipe in stages.values()] == ["mine/text", "mine/s1_audio_adapter", "mine/last"]


def test_typed_words_win_over_the_file_and_those_of_one_stage_over_those_of_all(three):
    words = [three, "text.seed=9", "seed=7", "schedule.steps=3", "last.schedule.steps=5", "last.model=tiny"]
    stages = load_pipeline(words, 2).stages
    assert [recipe.seed for recipe in stages.values()] == [9, 7, 7]
    assert [recipe.schedule.steps for recipe in stages.values()] == [3, 3, 5]
    assert [recipe.optimizer.lr for recipe in stages.values()] == [0.5, 1e-3, 2e-4]
    assert [recipe.seed for recipe in load_pipeline([three], 2).stages.values()] == [2, 1, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name="], "name= is missing; choose one of .*smoke"),
        (["name=thre"], "name=thre: no such pipeline; choose one of .*smoke, or a file"),
        (["name=thre.yaml"], "thre.yaml: No such file or directory; expected a pipeline"),
        (["nosuch=1"], "text: nosuch is not a key of the recipe"),
        (["last.seed=x"], "last: seed: Value 'x'"),
        (["lst.seed=1"], "lst.seed=1: lst is neither a stage nor a key of the recipe; stages: text, s1_"),
        (["init_from=x"], "init_from=x: is for one stage; write STAGE.init_from=x"),
        (["last.parallel.tensor=3"], "last: model.vocab_size=4096: not a multiple of parallel.tensor=3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_the_stage(three, words, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        load_pipeline(words if words[0].startswith("name=") else [three, *words], 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {}", "not a pipeline"),
        ("stages: [a, b]", "not a pipeline"),
        ("stages: {a: [1]}", "not a pipeline"),
        ("stages: {a: []}\nsteps: 3", "not a pipeline"),
        ("stages: {data: []}", "a stage cannot be called data"),
        ("{", "not a pipeline"),
    ],
)
def test_a_file_that_is_no_pipeline_is_refused(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"broken.yaml: {message}"):
        load_pipeline([f"name={path}"], 2)


def test_cfg_job_shows_every_stage_and_runs_none(capsys):
    assert run(["name=smoke", "--cfg", "job", "schedule.steps=3"], job=pytest.fail, commands=DATA) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert {stage["schedule"]["steps"] for stage in shown.values() if "schedule" in stage} == {3}
    assert "s3_long_context" in shown


@pytest.mark.parametrize("place", range(3))
def test_flags_may_stand_anywhere_among_the_words(place, capsys):
    words = ["schedule.steps=3", "name=smoke"]
    assert run([*words[:place], "--cfg", "job", *words[place:]], job=pytest.fail, commands=DATA) == 0
    assert yaml.safe_load(capsys.readouterr().out)["s2_general"]["schedule"]["steps"] == 3
    assert run([*words[:place], "--help", *words[place:]], job=pytest.fail, commands=DATA) == 0
    assert "smoke: " in capsys.readouterr().out


def test_help_lists_the_pipelines_with_their_stages(capsys):
    assert run(["--help"], job=pytest.fail, commands=DATA) == 0
    assert "smoke: audio_encoder → codec → text_pretrain → s1_audio_adapter → " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--multirun"], "--multirun: a pipeline takes --help, --cfg job and --config-dir alone"),
        (["--hydra-help"], "--hydra-help: a pipeline takes"),
        (["--cfg", "job", "--resolve"], "--resolve: a pipeline takes"),
        (["--cfg", "all"], "--cfg all: there is nothing of Hydra's to show"),
        (["--config-name", "x"], "--config-name is not for omni-train"),
        (["--nosuch"], "unrecognized arguments: --nosuch"),
        (["--config-dir", "/nosuch"], "text_pretrain: --config-dir /nosuch: no such folder"),
    ],
    ids=" ".join,
)
def test_another_flag_is_refused(flags, message):
    with pytest.raises(UserError, match=f"^{message}"):
        run(["name=rehearsal_thinker", *flags], job=pytest.fail, commands=DATA)


def test_recipes_and_pipelines_of_ones_own_are_beside_ours(tmp_path, capsys):
    for folder, text in (("schedule", "steps: 23\nglobal_batch: 4\n"), ("pipeline", "stages: {text_pretrain: []}\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(text)
    own = ["--config-dir", str(tmp_path)]
    assert run(["name=mine", "schedule=mine", "--cfg", "job", *own], job=pytest.fail, commands=DATA) == 0
    assert yaml.safe_load(capsys.readouterr().out)["text_pretrain"]["schedule"]["steps"] == 23
    assert run(["--help", *own], job=pytest.fail, commands=DATA) == 0
    assert "mine: text_pretrain" in (shown := capsys.readouterr().out) and "smoke: " in shown


def test_a_pipeline_from_elsewhere_runs_no_code(tmp_path, monkeypatch):
    (tmp_path / "marking.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "their.yaml"
    for word in ("+hydra.callbacks.x._target_=marking.mark", "hydra.searchpath=[pkg://marking]"):
        path.write_text(yaml.safe_dump({"stages": {"text_pretrain": [word]}}))
        with pytest.raises(UserError, match=f"^text_pretrain: {re.escape(word)}: Hydra composes recipes"):
            load_pipeline([f"name={path}"], 2)
    path.write_text("stages: !!python/object/apply:os.system ['exit 1']")
    with pytest.raises(UserError, match="not a pipeline"):
        load_pipeline([f"name={path}"], 2)
