"""Which checkpoint a run goes on from, whatever became of the link to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from omni_train.checkpoint.integrity import digests_of
from omni_train.checkpoint.store import Store, newest, resolve, step_of
from omni_train.errors import UserError
from omni_train.recipe.compose import write_recipe
from omni_train.recipe.schema import CheckpointConfig
from omni_train.training.pipeline import is_complete
from tests.support.thinker import small_recipe


@pytest.fixture
def store(tmp_path) -> Store:
    """Of a run with complete checkpoints of steps 2, 4 and 6."""
    store = Store(tmp_path / "run" / "checkpoints", CheckpointConfig(keep=0))
    for step in (2, 4, 6):
        save(store, step)
    return store


def save(store: Store, step: int) -> None:
    partial, final = store._begin(step)
    names = store._write_loader(partial, {"world_size": 1, "step": step})
    (partial / "metadata.json").touch()
    store._complete(partial, final, digests_of(partial, names))


def step(store: Store, number: int) -> Path:
    return store.directory / f"step_{number:08d}"


def link(store: Store) -> Path:
    return store.directory / "latest"


def unlinked(store: Store) -> None:
    link(store).unlink()


def dangling(store: Store) -> None:
    link(store).unlink()
    link(store).symlink_to("step_00000008")


def stale(store: Store) -> None:
    link(store).unlink()
    link(store).symlink_to("step_00000004")


@pytest.mark.parametrize("lose", [unlinked, dangling, stale])
def test_the_newest_complete_checkpoint_is_taken_and_linked_again(store, capsys, lose):
    lose(store)
    (store.directory / "step_00000010.partial").mkdir()
    (store.directory / "step_00000010.partial" / "metadata.json").touch()
    (store.directory / "step_00000012_kept").mkdir()
    (store.directory / "step_00000012_kept" / "metadata.json").touch()
    run = store.directory.parent
    for path in (run, store.directory):
        assert resolve(path) == step(store, 6)
    assert store.latest() == step(store, 6)
    assert (
        "checkpoints/latest: does not lead to the newest complete checkpoint, step_00000006" in capsys.readouterr().err
    )
    assert link(store).resolve() == step(store, 6)
    assert store.latest() == step(store, 6)
    assert capsys.readouterr().err == ""


def test_a_path_through_a_lost_link_is_understood(store):
    dangling(store)
    assert resolve(link(store)) == step(store, 6)
    stale(store)
    assert resolve(link(store)) == step(store, 4)  # which was asked for by name


def test_removing_the_newest_goes_back_to_the_one_before(store):
    for path in step(store, 6).iterdir():
        path.unlink()
    step(store, 6).rmdir()
    assert store.latest() == step(store, 4)


def test_what_is_newer_but_incomplete_is_set_aside_by_name_and_does_not_block_its_step(store, capsys):
    (step(store, 6) / "metadata.json").unlink()
    (step(store, 6) / "remains").touch()
    assert store.latest() == step(store, 4)
    said = capsys.readouterr().err
    assert f"WARNING: {step(store, 6)}: damaged: it was not written to its end, or lost its metadata.json" in said
    assert "set aside as step_00000006.damaged, step_00000004 is taken" in said
    save(store, 6)
    assert store.latest() == step(store, 6)
    assert not (step(store, 6) / "remains").exists()
    assert (store.directory / "step_00000006.damaged" / "remains").exists()


def test_what_could_not_be_set_aside_when_the_run_began_is_not_overwritten(store):
    """It came while the run was going on: a restored backup, say."""
    (step(store, 8)).mkdir()
    (step(store, 8) / "restored").touch()
    save(store, 8)
    assert (store.directory / "step_00000008.damaged" / "restored").exists()


def test_only_what_is_set_aside_is_no_new_run(store):
    for path in [*store.directory.glob("step_*")]:
        path.rename(path.with_name(path.name + ".damaged"))
    link(store).unlink()
    with pytest.raises(UserError, match=r"step_00000006.damaged: not a complete checkpoint, and there is no other"):
        store.latest()


def test_what_a_crash_left_of_the_first_checkpoint_is_a_new_run(tmp_path):
    (tmp_path / "checkpoints" / "step_00000002.partial").mkdir(parents=True)
    store = Store(tmp_path / "checkpoints", CheckpointConfig())
    assert store.latest() is None
    assert not list(store.directory.iterdir())


def test_a_link_in_a_circle_or_half_made_is_mended(store):
    link(store).unlink()
    link(store).symlink_to("latest")
    link(store).with_name("latest.new").symlink_to("step_00000002")  # a crash came before it was renamed
    assert resolve(store.directory) == store.latest() == step(store, 6)
    assert link(store).resolve() == step(store, 6)
    assert not link(store).with_name("latest.new").exists()


def test_a_link_that_cannot_be_made_costs_a_line(store, capsys, monkeypatch):
    """Object stores and some network file systems have none."""

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    save(store, 8)
    assert "checkpoints/latest: cannot be moved to step_00000008: Operation not permitted" in capsys.readouterr().err
    assert step_of(store.latest()) == store.last == 8


def test_nothing_complete_is_no_new_run(store):
    for number in (2, 4, 6):
        (step(store, number) / "metadata.json").unlink()
    with pytest.raises(UserError, match="step_00000006: not a complete checkpoint, and there is no other"):
        store.latest()
    for number in (2, 4, 6):
        shutil.rmtree(step(store, number))
    with pytest.raises(UserError, match="step_00000006: not a complete checkpoint, and there is no other"):
        store.latest()
    link(store).unlink()
    assert store.latest() is None


def test_a_copy_that_followed_the_link_is_refused_and_may_be_started_from(store):
    """What it holds is known, but not of which step."""
    link(store).unlink()
    for number in (2, 4):
        (step(store, number) / "metadata.json").unlink()
    step(store, 6).rename(link(store))
    with pytest.raises(UserError, match=r"latest: is a folder, not a link; .* give it the name of the step"):
        store.latest()
    for path in (store.directory.parent, link(store)):
        assert resolve(path) == link(store)


def test_a_link_may_lead_elsewhere(store, tmp_path):
    for number in (2, 4, 6):
        step(store, number).rename(tmp_path / step(store, number).name)
    link(store).unlink()
    link(store).symlink_to(tmp_path / "step_00000004")
    assert store.latest() == resolve(store.directory.parent) == tmp_path / "step_00000004"


def test_pruning_keeps_the_newest_and_leaves_no_remains(store):
    (step(store, 2) / "metadata.json").unlink()  # interrupted while it was removed
    store.config.keep = 2
    save(store, 8)
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step_00000006", "step_00000008"]


def test_where_the_link_leads_is_not_pruned(store):
    stale(store)
    store.config.keep = 1
    store._prune(step(store, 6))
    assert sorted(map(step_of, store.directory.glob("step_*"))) == [4, 6]


def test_newer_checkpoints_neither_are_pruned_nor_count(store):
    unlinked(store)
    store.config.keep = 1
    store._prune(step(store, 4))
    assert sorted(map(step_of, store.directory.glob("step_*"))) == [4, 6]


def test_what_cannot_be_pruned_costs_a_line(store, capsys, monkeypatch):
    def refuse(path):
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: None if ignore_errors else refuse(path))
    store.config.keep = 1
    save(store, 8)
    assert "older checkpoints cannot be removed: [Errno 39] Directory not empty" in capsys.readouterr().err
    assert store.latest() == step(store, 8)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/checkpoints: cannot be written: Not a directory"):
        Store(tmp_path / "file" / "checkpoints", CheckpointConfig())


def test_a_checkpoint_that_lacks_a_loader_is_refused(store):
    assert store.loader_states(step(store, 6)) == [{"world_size": 1, "step": 6}]
    torch.save({"world_size": 2, "step": 6}, step(store, 6) / "loader_00000.pt")
    with pytest.raises(UserError, match=r"step_00000006: damaged: lacks files loader_XXXXX\.pt"):
        store.loader_states(step(store, 6))
    (step(store, 6) / "loader_00000.pt").unlink()
    with pytest.raises(UserError, match=r"step_00000006: damaged: lacks files loader_XXXXX\.pt"):
        store.loader_states(step(store, 6))
    (step(store, 6) / "loader_00000.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"step_00000006: damaged: loader_00000\.pt cannot be read"):
        store.loader_states(step(store, 6))


@pytest.mark.parametrize("lose", [unlinked, dangling, stale])
def test_a_stage_is_complete_by_its_newest_checkpoint(store, lose):
    recipe = small_recipe()
    recipe.runs_dir, recipe.run, recipe.schedule.steps = str(store.directory.parents[1]), "run", 6
    write_recipe(recipe, store.directory.parent / "recipe.yaml")
    for number in (4, 6):
        (step(store, number) / "network.safetensors").touch()
        (step(store, number) / "progress.json").write_text(json.dumps({"tokens": 1.0}))
    lose(store)
    assert is_complete(recipe)
    recipe.schedule.steps = 7
    assert not is_complete(recipe)
    recipe.schedule.steps = 6
    (step(store, 6) / "progress.json").write_text("{")  # the run itself sees what it can go on from
    assert not is_complete(recipe)


def test_a_checkpoint_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch):
    checkpoint = tmp_path / "step_00000002"
    checkpoint.mkdir()

    def refuse(path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "exists", refuse)  # as stat does, but for root
    with pytest.raises(UserError, match=r"step_00000002: may not be read; change its permissions$"):
        newest(tmp_path)
