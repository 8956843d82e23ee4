"""Hydra's command line: what reaches the job, and what is shown instead."""

from pathlib import Path

import pytest
import yaml

from omni_train.errors import UserError
from omni_train.recipe import hydra_app


@pytest.fixture(autouse=True)
def _one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(*arguments, result=0):
    """Exit code, and the recipes that reached the job."""
    recipes = []

    def job(recipe):
        recipes.append(recipe)
        return result

    return hydra_app.run("omni-train train", arguments, job), recipes


def test_overrides_and_groups_reach_the_job_and_nothing_is_left_behind():
    code, [recipe] = run("parallel.tensor=1", "schedule.steps=17", "data.path=/d", "seed=7", "tracking=wandb_offline")
    assert code == 0
    assert (recipe.schedule.steps, recipe.seed, recipe.data.tokenizer) == (17, 7, "/d/tokenizer")
    assert recipe.tracking.mode == "offline"
    assert list(Path.cwd().iterdir()) == []


def test_the_exit_code_is_the_jobs():
    assert run(result=3)[0] == 3


def test_an_error_of_the_job_arrives_as_it_was_raised(capsys):
    def job(recipe):
        raise UserError("no shards in rehearsal")

    with pytest.raises(UserError, match=r"^no shards in rehearsal$"):
        hydra_app.run("omni-train train", [], job)
    assert capsys.readouterr().err == ""


def test_the_world_of_the_launcher_is_checked_before_the_job(monkeypatch):
    with pytest.raises(UserError, match=r"launchers/local.sh 2 …"):
        run("parallel.tensor=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("parallel.tensor=2")[1][0].parallel.tensor == 2


def test_cfg_job_shows_the_composed_recipe_without_running_it(capsys):
    code, recipes = run("stage=s2_general", "model=flash_35b_a3b", "--cfg", "job")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (code, recipes) == (0, [])
    assert shown["model"]["num_experts"] == 256
    assert shown["data"]["row_tokens"] == 32768
    assert "hydra" not in shown


def test_cfg_job_refuses_a_recipe_that_cannot_work():
    with pytest.raises(UserError, match=r"model.num_experts=8: not a multiple of parallel.expert=3"):
        run("--cfg", "job", "parallel.expert=3")


def test_help_names_groups_keys_and_the_refusals_page(capsys):
    with pytest.raises(SystemExit) as exit_:
        run("--help")
    shown = capsys.readouterr().out
    assert exit_.value.code in (0, None)
    assert "model: flash_35b_a3b, plus_122b_a10b" in shown
    assert "row_tokens: 1024" in shown
    assert "docs/recipes.md" in shown


def test_multirun_runs_one_job_after_the_other_in_folders_of_their_own():
    code, recipes = run("--multirun", "seed=1,2", "schedule.steps=3,5", "run=sweep")
    assert code == 0
    assert [(r.seed, r.schedule.steps, r.run) for r in recipes] == [
        (1, 3, "sweep/0"),
        (1, 5, "sweep/1"),
        (2, 3, "sweep/2"),
        (2, 5, "sweep/3"),
    ]


def test_multirun_stops_at_the_first_job_that_fails():
    code, recipes = run("--multirun", "seed=1,2,3", result=4)
    assert code == 4
    assert [recipe.seed for recipe in recipes] == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfgg"], "unrecognized arguments: --cfgg; omni-train train --hydra-help lists the flags"),
        (["--cfg", "nosuch"], "argument --cfg/-c: invalid choice: 'nosuch'"),
        (["--cfg", "job", "--multirun"], "Only one of --run, --multirun, --cfg"),
        (["--config-dir", "/nosuch"], "Additional config directory '/nosuch' not found"),
        (["nosuch=1"], "nosuch is not a key of the recipe"),
        (["--multirun", "seed=1,x"], "seed: Value 'x' of type 'str' could not be converted to Integer"),
        (["--multirun", "nosuch=1,2"], "nosuch is not a key of the recipe"),
        (["--help", "nosuch=1"], "nosuch is not a key of the recipe"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_no_job_runs(arguments, message, capsys):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""
