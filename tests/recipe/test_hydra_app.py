"""Hydra's command line: what reaches the job, and what is shown instead."""

import sys
from pathlib import Path

import pytest
import yaml

from omni_train.errors import UserError
from omni_train.processes import Exit
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
    with pytest.raises(UserError, match=r"omni-train launch 2 …"):
        run("parallel.tensor=2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("parallel.tensor=2")[1][0].parallel.tensor == 2


def test_cfg_job_shows_the_composed_recipe_without_running_it(capsys):
    code, recipes = run("stage=s2_general", "model=flash_35b_a3b", "--cfg", "job")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (code, recipes) == (0, [])
    assert shown["model"]["thinker"]["num_experts"] == 256
    assert shown["data"]["row_tokens"] == 32768
    assert "hydra" not in shown


def test_cfg_job_refuses_a_recipe_that_cannot_work():
    with pytest.raises(UserError, match=r"model.thinker.num_experts=8: not a multiple of parallel.expert=3"):
        run("--cfg", "job", "parallel.expert=3")


def test_help_names_recipes_keys_and_the_refusals_page(capsys):
    assert run("--help", "--multirun") == (0, [])
    shown = capsys.readouterr().out
    assert "\n  model      flash_35b_a3b, plus_122b_a10b" in shown
    assert "\n  tracking   none, wandb, wandb_offline\n" in shown
    assert "model/encoders" not in shown and "pipeline  " not in shown
    assert "\n  schedule.steps=" in shown
    assert "docs/recipes.md" in shown


def test_help_takes_names_of_groups(capsys):
    assert run("--help", "zero", "data.sources") == (0, [])
    shown = capsys.readouterr().out
    assert "  zero.stage=1  (" in shown and "  data.sources.weight=1.0  (" in shown
    assert "schedule" not in shown


def test_hydras_own_help_has_the_flags(capsys):
    assert run("--hydra-help") == (0, [])
    assert "--config-dir" in capsys.readouterr().out


def test_multirun_runs_one_job_after_the_other_in_folders_of_their_own():
    code, recipes = run("--multirun", "seed=1,2", "schedule.steps=3,5", "run=sweep")
    assert code == 0
    assert [(r.seed, r.schedule.steps, r.run) for r in recipes] == [
        (1, 3, "sweep/0"),
        (1, 5, "sweep/1"),
        (2, 3, "sweep/2"),
        (2, 5, "sweep/3"),
    ]


def sweep(*results):
    """Exit code of a sweep whose jobs end like this, and how many of them ran."""
    ends = iter(results)

    def job(recipe):
        end = next(ends)
        if end in (WRONG, CRASH):
            raise UserError(WRONG) if end == WRONG else RuntimeError(CRASH)
        return end

    code = hydra_app.run("omni-train train", ["--multirun", f"seed={','.join(map(str, range(len(results))))}"], job)
    return code, len(results) - len(list(ends))


WRONG, CRASH = "no shards in rehearsal", "out of memory"


@pytest.mark.parametrize(
    ("results", "code", "ran"),
    [
        ((0, WRONG, 0), Exit.wrong, 3),
        ((CRASH, WRONG, 0), Exit.failed, 3),
        ((WRONG, 139, 0), 139, 3),
        ((WRONG, Exit.stopped, 0), Exit.stopped, 2),  # the same command goes on, and comes to the wrong one again
        ((CRASH, Exit.interrupted, 0), Exit.interrupted, 2),
    ],
)
def test_a_sweep_goes_on_after_a_job_that_fails_and_ends_with_the_worst(results, code, ran, capsys):
    assert sweep(*results) == (code, ran)
    err = capsys.readouterr().err
    assert ("error: no shards in rehearsal" in err) == (WRONG in results)
    assert ("RuntimeError: out of memory" in err) == (CRASH in results)


def test_with_several_processes_a_sweep_ends_with_the_job_that_fails(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep(0, Exit.failed, 0) == (Exit.failed, 2)


def test_a_sweep_is_refused_before_its_first_job_where_its_last_cannot_work():
    with pytest.raises(UserError, match=r"^model\.thinker\.num_experts=8: not a multiple of parallel\.expert=3"):
        run("--multirun", "parallel.expert=1,3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfgg"], "unrecognized arguments: --cfgg; omni-train train --hydra-help lists the flags"),
        (["--cfg", "nosuch"], "argument --cfg/-c: invalid choice: 'nosuch'"),
        (["--cfg", "job", "--multirun"], "--multirun and --cfg: give one of them"),
        (["--cfg", "hydra"], "--cfg hydra: there is nothing of Hydra's to show; write --cfg job"),
        (["--cfg", "job", "--package", "nosuch"], "--package nosuch: no such part of the recipe"),
        (["--resolve"], "--resolve goes with --cfg; "),
        (["--package", "model"], "--package goes with --cfg"),
        (["--config-dir", "/nosuch"], "--config-dir /nosuch: no such folder"),
        (["--config-name", "other"], "--config-name is not for omni-train: the recipe is composed by config.yaml"),
        (["--config-path", "/tmp"], "--config-path is not for omni-train"),
        (["--info"], "--info is not for omni-train: --cfg job shows"),
        (["--shell-completion", "install=bash"], "--shell-completion is not for omni-train"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun is not for omni-train: it would run what"),
        (["run=${hydra:job.num}"], "run: "),
        (["nosuch=1"], "nosuch is not a key of the recipe"),
        (["--multirun", "seed=1,x"], "seed: Value 'x' of type 'str' could not be converted to Integer"),
        (["--multirun", "nosuch=1,2"], "nosuch is not a key of the recipe"),
        (["--help", "nosuch=1"], "nosuch is not a key of the recipe"),
        (["--help", "nosuch"], "--help nosuch: no such key or group of keys; groups are zero, "),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_no_job_runs(arguments, message, capsys):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


@pytest.fixture
def own(tmp_path):
    """A folder of recipes beside the tree, and a module whose import leaves a mark."""
    files = {
        "schedule/mine.yaml": "steps: 23\nglobal_batch: 4\n",
        "pipeline/mine.yaml": "stages:\n  text_pretrain: [schedule=mine]\n",
        "stage/marking.yaml": "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: marking.mark}\n",
        "stage/logging.yaml": "# @package _global_\nhydra:\n  job_logging:\n    handlers: {x: {(): marking.mark}}\n",
        "stage/sweeping.yaml": "# @package _global_\nhydra:\n  sweep: {dir: elsewhere}\n",
        "stage/launching.yaml": "# @package _global_\nhydra:\n  launcher: {_target_: marking.mark}\n",
        "hydra/launcher/marking.yaml": "_target_: marking.mark\n",
        "stage/making.yaml": "# @package _global_\nmodel: {_target_: marking.mark}\n",
        "marking.py": "from pathlib import Path\ndef mark(**_): pass\nPath('marked').touch()\n",
    }
    for name, text in files.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    return tmp_path / "own"


def test_recipes_of_ones_own_are_beside_ours_whatever_is_asked(own, capsys):
    words = ["schedule=mine", "--config-dir", str(own)]
    assert run(*words)[1][0].schedule.steps == 23
    assert [recipe.schedule.steps for recipe in run(*words, "--multirun", "seed=1,2")[1]] == [23, 23]
    assert run(*words, "--cfg", "job", "--package", "schedule.steps")[1] == []
    assert capsys.readouterr().out == "23\n"
    assert run(*words, "--help")[1] == []
    assert ", mine, " in capsys.readouterr().out


@pytest.mark.parametrize("place", range(4))
def test_flags_may_stand_anywhere_among_the_words(own, place, capsys, monkeypatch):
    words = ["schedule=mine", "seed=3", "model=tiny"]
    monkeypatch.chdir(own.parent)
    for flags in (["--config-dir", "own", "--cfg", "job"], ["-c", "job", "--config-dir=own"]):
        assert run(*words[:place], *flags, *words[place:]) == (0, [])
        shown = yaml.safe_load(capsys.readouterr().out)
        assert (shown["seed"], shown["schedule"]["steps"]) == (3, 23)
    assert run(*words[:place], "--config-dir", "own", *words[place:], "--help") == (0, [])
    assert run("--help", *words[:place], "--config-dir", "own", *words[place:]) == (0, [])
    assert run(*words[:place], "--multirun", *words[place:], "--config-dir=own")[1][0].schedule.steps == 23


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("+hydra.callbacks.x._target_=marking.mark", []),
        ("+hydra.callbacks={x:{_target_:marking.mark}}", ["--multirun"]),
        ("hydra.searchpath=[pkg://marking]", []),
        ("hydra/launcher=joblib", []),
        ("hydra/launcher=joblib", ["--multirun", "--help"]),
        ("hydra/launcher=marking", ["--multirun"]),
        ("hydra/launcher=joblib,basic", ["--multirun"]),
        ("+hydra/launcher=joblib", ["--multirun"]),
        ("hydra.launcher._target_=marking.mark", ["--multirun", "hydra/launcher=joblib"]),
        ("hydra.launcher={_target_:marking.mark}", ["--multirun", "hydra/launcher=joblib"]),
        ("hydra.launcher.prefer={_target_:marking.mark}", ["--multirun", "hydra/launcher=joblib"]),
        ("stage=launching", ["--multirun"]),
        ("hydra.sweeper._target_=marking.mark", ["--multirun"]),
        ("+tracking@hydra.callbacks=wandb", []),
        ("stage=marking", ["--multirun"]),
        ("stage=logging", ["--help"]),
        ("stage=sweeping", ["--cfg", "job"]),
        ("+x._target_=marking.mark", []),
        ("stage=making", []),
    ],
)
def test_no_word_and_no_recipe_runs_code_or_tells_hydra_what_to_do(own, word, mode, monkeypatch, capsys):
    monkeypatch.syspath_prepend(own)
    monkeypatch.delitem(sys.modules, "marking", raising=False)
    with pytest.raises(UserError) as error:
        run("--config-dir", str(own), word, *mode)
    assert "\n" not in str(error.value)
    if not word.startswith("stage="):
        assert str(error.value).startswith(word) or "is not a key of the recipe" in str(error.value)
    assert {path.name for path in own.parent.iterdir()} == {"own"}
    assert "marking" not in sys.modules
    assert capsys.readouterr() == ("", "")
