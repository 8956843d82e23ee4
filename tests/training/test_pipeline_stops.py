"""A signal between two stages of a pipeline, and before its report."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from omni_train import stopping
from omni_train.recipe.pipeline import load_pipeline
from omni_train.recipe.schema import Recipe, ScheduleConfig
from omni_train.training import pipeline as room
from omni_train.training.unlogged import UnloggedStep


class Ended(Exception):
    """In the place of a process that ends."""


@pytest.fixture
def ending(monkeypatch, tmp_path):
    """Runs a pipeline of two stages that train nothing and hear a signal at the end of one; the process's last line."""

    def run(signalled: int) -> tuple[int, str, int]:
        trained = []

        def train(recipe, lock) -> bool:
            stopping.finish_first("finishing the checkpoint of step 1")
            trained.append(recipe)
            if len(trained) == signalled:
                stopping._remember(signal.SIGTERM)
            return True

        def end(code: int, line: str) -> None:
            raise Ended(code, line)

        monkeypatch.setattr(room, "train", train)
        monkeypatch.setattr(room, "holding", lambda *_, **__: nullcontext())
        monkeypatch.setattr(room, "_from_checkpoints", lambda recipe, _: recipe)
        monkeypatch.setattr(stopping, "end", end)
        monkeypatch.setattr(room, "report", lambda directory: pytest.fail("reported"))
        path = Path(tmp_path, "two.yaml")
        (tmp_path / "two").mkdir()
        path.write_text("stages: {text_pretrain: [], s2_general: [data=rehearsal, model=tiny]}\n")
        stages = load_pipeline([f"name={path}", f"runs_dir={tmp_path}", "model=tiny"], world_size=1)
        with pytest.raises(Ended) as ended:
            room.run_pipeline(stages)
        return *ended.value.args, len(trained)

    yield run
    stopping._asked, stopping._doing = None, None
    room.lines._in_a_run = False


def test_a_stage_whose_last_evaluation_was_cut_off_is_not_complete(monkeypatch, tmp_path):
    recipe = Recipe(runs_dir=str(tmp_path), run="r", schedule=ScheduleConfig(steps=3))
    last = tmp_path / "r" / "checkpoints" / f"step_{recipe.schedule.steps:08d}"
    last.mkdir(parents=True)
    (last / "metadata.json").touch()
    monkeypatch.setattr(room, "read_progress", lambda _: {"tokens": 0})
    assert room.is_complete(recipe)
    UnloggedStep(tmp_path / "r").keep({"step": recipe.schedule.steps})
    assert not room.is_complete(recipe)


@pytest.mark.parametrize(
    ("signalled", "where"),
    [(1, "at the start of stage 2 of 2, s2_general, nothing new to save"), (2, "before the report")],
)
def test_it_goes_no_further(ending, signalled, where):
    code, line, trained = ending(signalled)
    assert (code, trained) == (75, signalled)
    assert line.startswith(f"stopped by SIGTERM {where}")
