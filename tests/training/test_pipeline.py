"""A pipeline whose earlier stage left a damaged checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from omni_train.checkpoint.integrity import damaged
from omni_train.checkpoint.store import DamagedCheckpoint
from omni_train.recipe.data_stage import DataStage
from omni_train.recipe.pipeline import Pipeline
from omni_train.training import pipeline
from tests.support.thinker import small_recipe


@pytest.fixture
def two_stages(tmp_path, monkeypatch) -> Pipeline:
    """Of which the first has checkpoints of steps 2 and 4, its last."""
    stages = {}
    for name in ("first", "second"):
        stages[name] = small_recipe()
        stages[name].runs_dir, stages[name].run = str(tmp_path), f"p/{name}"
    for step in (2, 4):
        folder = tmp_path / "p" / "first" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").touch()
    monkeypatch.setattr(pipeline, "holding", lambda *_, **__: nullcontext())
    monkeypatch.setattr(pipeline.lines, "_in_a_run", False)  # and afterwards, too
    (tmp_path / "p").mkdir(exist_ok=True)
    monkeypatch.setattr(pipeline, "report", lambda directory: None)
    return Pipeline(tmp_path / "p", stages)


def trained(monkeypatch, two_stages: Pipeline, damage: Path) -> list[str]:
    """The stages in the order they are trained in; the second finds a checkpoint damaged when it first starts."""
    order: list[str] = []
    complete = {"first"}

    def attempt(name: str) -> bool:
        order.append(name)
        if order == ["second"]:
            complete.discard("first")
            raise damaged(damage, "model.pt has 0 bytes, not 7")
        complete.add(order[-1])
        return True

    monkeypatch.setattr(pipeline, "train", lambda recipe, lock: attempt(Path(recipe.run).name))
    monkeypatch.setattr(pipeline, "make_data", lambda stage, name, title, lock: attempt(name))
    monkeypatch.setattr(pipeline, "is_complete", lambda recipe: Path(recipe.run).name in complete)
    pipeline.run_pipeline(two_stages)
    return order


def test_the_stage_before_goes_on_from_what_it_has_and_the_damaged_one_is_set_aside(monkeypatch, two_stages, capsys):
    checkpoints = two_stages.directory / "first" / "checkpoints"
    assert trained(monkeypatch, two_stages, checkpoints / "step_00000004") == ["second", "first", "second"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004.damaged"]
    assert "stage 1, first: goes on from the checkpoint before" in capsys.readouterr().err


def test_a_stage_that_makes_data_of_a_damaged_one_sends_back_too(monkeypatch, two_stages):
    first = two_stages.directory / "first"
    words = {"codec": str(first), "out": str(two_stages.directory / "second")}
    stages = Pipeline(two_stages.directory, {**two_stages.stages, "second": DataStage("data codes", print, words)})
    assert trained(monkeypatch, stages, first / "checkpoints" / "step_00000004") == ["second", "first", "second"]


def test_what_is_no_checkpoint_of_an_earlier_stage_ends_it(monkeypatch, two_stages, tmp_path):
    with pytest.raises(DamagedCheckpoint, match=r"elsewhere/step_00000004: damaged: model\.pt has 0 bytes, not 7"):
        trained(monkeypatch, two_stages, tmp_path / "elsewhere" / "step_00000004")
