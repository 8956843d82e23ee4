"""What a changed recipe is told when a run goes on, on all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omni_train.errors import UserError
from omni_train.recipe.compose import write_recipe
from omni_train.recipe.schema import OptimizerConfig
from tests.support.thinker import small_recipe


def check(rank, world_size, recipe, directory):
    from omni_train.training.resume import check_resume

    try:
        check_resume(recipe, directory)
    except UserError as error:
        return str(error)


@pytest.fixture
def made(tmp_path):
    """The directory of a run with a checkpoint."""
    checkpoint = tmp_path / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "metadata.json").touch()
    write_recipe(small_recipe(), tmp_path / "recipe.yaml")
    return tmp_path


def test_what_a_run_keeps_is_refused_by_name_on_all_ranks(made, distributed):
    first, second = distributed(2, check, small_recipe(seed=78), made)
    assert first == second
    assert first.startswith(f"{made}: was made with seed=77, now it is 78; give another run=, or remove")


def test_a_key_that_says_where_files_lie_tells_of_links(made):
    from omni_train.recipe.changes import Difference
    from omni_train.recipe.keys import Change
    from omni_train.training.resume import refuse_change

    for key, told in {
        "data.tokenizer": True,
        "data.sources": True,
        "codec_training.teacher": True,
        "seed": False,
    }.items():
        with pytest.raises(UserError) as error:
            refuse_change(made, Difference(key, "a", "b", Change.kept))
        assert str(error.value).endswith("; where data were moved, leave links") is told


def test_what_may_change_is_said_in_a_line(made, capsys, monkeypatch):
    from omni_train.training import resume

    monkeypatch.setattr(resume, "on_first_rank", lambda function: function())
    recipe = small_recipe(optimizer=OptimizerConfig(lr=0.5, clip_grad=0.7, eps=1e-5))
    resume.check_resume(replace(recipe, loss_chunk_tokens=7), made)
    line = f"{made}: goes on with loss_chunk_tokens=7 instead of 40, optimizer.lr=0.5 instead of 0.0003\n"
    assert capsys.readouterr().err == line
    resume.check_resume(small_recipe(), made)
    assert capsys.readouterr().err == ""


def test_a_run_without_its_recipe_goes_on_with_a_warning_and_one_without_a_checkpoint_begins(made, capsys, monkeypatch):
    from omni_train.training import resume

    monkeypatch.setattr(resume, "on_first_rank", lambda function: function())
    (made / "recipe.yaml").write_text("seed: ${oc.env:HOME}")
    with pytest.raises(UserError, match=r"recipe\.yaml: seed=\$.*; mend it, or remove it to go on without comparing"):
        resume.check_resume(small_recipe(), made)
    (made / "recipe.yaml").unlink()
    resume.check_resume(small_recipe(), made)
    assert capsys.readouterr().err.startswith(f"WARNING: {made}/recipe.yaml: not there, so nothing shows whether")
    (made / "checkpoints" / "step_00000003" / "metadata.json").unlink()
    resume.check_resume(small_recipe(seed=5), made)
    assert capsys.readouterr().err == ""
