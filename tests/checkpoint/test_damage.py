"""A checkpoint that is not as it was written is noticed, and the one before is taken in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_train import platform
from omni_train.checkpoint.integrity import DIGESTS, find_damage, require_intact
from omni_train.checkpoint.random_state import restore_random_state
from omni_train.checkpoint.sharded import read_model_config, read_progress
from omni_train.checkpoint.store import DamagedCheckpoint, Store, newest
from omni_train.recipe.schema import CheckpointConfig, Verify
from tests.support.runs import logged, run

ENGINES = ("megatron", "deepspeed")


@pytest.fixture(scope="module")
def finished(distributed, tmp_path_factory) -> dict[str, Path]:
    """A run of two ranks on each engine, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    for engine in ENGINES:
        assert distributed(2, run, folder / engine, engine)[0].whole
    return {engine: folder / engine for engine in ENGINES}


@pytest.fixture(params=ENGINES)
def copied(request, finished, tmp_path) -> Path:
    """A copy of such a run."""
    shutil.copytree(finished[request.param], tmp_path / request.param, symlinks=True)
    return tmp_path / request.param


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def a_tensor_file(checkpoint: Path) -> Path:
    return sorted([*checkpoint.glob("*.distcp"), *checkpoint.glob("*.safetensors")])[-1]


def files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def test_every_file_has_a_digest_and_damage_of_any_is_found_by_name(copied):
    checkpoint = step(copied, 6)
    names = {str(path.relative_to(checkpoint)) for path in files(checkpoint)}
    assert set(json.loads((checkpoint / DIGESTS).read_text())) == names - {DIGESTS}
    wanted = {
        "model.pt",
        "metadata.json",
        *(f"{kind}_0000{rank}.pt" for kind in ("loader", "random") for rank in (0, 1)),
    }
    assert wanted < names
    assert any(name.startswith("zero/") for name in names) or any(name.endswith(".distcp") for name in names)
    assert find_damage(checkpoint, Verify.all) is None
    for path in files(checkpoint):
        whole = path.read_bytes()
        for harm in (flip_first, flip_middle, truncate, empty, grow, Path.unlink):
            if path.name == DIGESTS and harm in (grow, Path.unlink):
                continue  # without digests it is a checkpoint of the time before them
            harm(path)
            damage = find_damage(checkpoint, Verify.all)
            assert damage, f"{harm.__name__} of {path.name}"
            if path.name != DIGESTS:
                assert damage.startswith(f"{path.relative_to(checkpoint)} ")
            path.write_bytes(whole)
    (checkpoint / "loader_00002.pt").write_bytes(b"")
    assert find_damage(checkpoint, Verify.all) == "loader_00002.pt was not there when it was written"
    (checkpoint / "loader_00002.pt").rename(checkpoint / ".nfs0000000000000001")
    assert find_damage(checkpoint, Verify.all) is None


def test_how_much_is_read_is_the_recipe_s(copied):
    checkpoint = step(copied, 6)
    flip_middle(a_tensor_file(checkpoint))
    assert find_damage(checkpoint, Verify.all)
    assert find_damage(checkpoint, Verify.small) is None
    truncate(a_tensor_file(checkpoint))
    assert "bytes, not" in find_damage(checkpoint, Verify.small)
    assert find_damage(checkpoint, Verify.none) is None


def test_small_files_are_always_small(copied):
    flip_middle(step(copied, 6) / "loader_00001.pt")
    assert "loader_00001.pt" in find_damage(step(copied, 6), Verify.small)


@pytest.mark.parametrize("harm", [flip_middle, truncate, Path.unlink])
def test_the_one_before_is_taken_and_the_damaged_one_set_aside(copied, capsys, harm: Callable):
    checkpoint = step(copied, 6)
    name = a_tensor_file(checkpoint).name
    harm(a_tensor_file(checkpoint))
    before = {str(path.relative_to(checkpoint)): path.read_bytes() for path in files(checkpoint)}
    store = Store(copied / "checkpoints", CheckpointConfig())
    assert store.latest() == step(copied, 4) == newest(store.directory)
    said = capsys.readouterr().err
    assert f"WARNING: {checkpoint}: damaged: {name} " in said
    assert "set aside as step_00000006.damaged, step_00000004 is taken in its place" in said
    aside = checkpoint.with_name("step_00000006.damaged")
    assert {str(path.relative_to(aside)): path.read_bytes() for path in files(aside)} == before
    assert (store.directory / "latest").resolve() == step(copied, 4)
    store.config.keep = 1
    store._prune(step(copied, 4))
    assert sorted(path.name for path in store.directory.glob("step_*")) == ["step_00000004", aside.name]


def test_two_of_one_step_are_both_kept(copied):
    store = Store(copied / "checkpoints", CheckpointConfig())
    for _ in range(2):
        shutil.copytree(step(copied, 2), step(copied, 8))
        flip_first(step(copied, 8) / "model.pt")
        assert store.latest() == step(copied, 6)
    assert len([*store.directory.glob("step_00000008.damaged*")]) == 2


def test_where_none_is_whole_the_run_is_refused_and_nothing_moved(copied):
    for number in (2, 4, 6):
        flip_first(step(copied, number) / "model.pt")
    before = sorted((copied / "checkpoints").iterdir())
    store = Store(copied / "checkpoints", CheckpointConfig())
    with pytest.raises(DamagedCheckpoint, match=r"step_00000006: damaged: model.pt does not .*; there is no other"):
        store.latest()
    assert sorted((copied / "checkpoints").iterdir()) == before


def test_digests_that_are_gone_are_damage_where_an_older_checkpoint_has_them(copied, capsys):
    for number in (2, 6):
        (step(copied, number) / DIGESTS).unlink()
    store = Store(copied / "checkpoints", CheckpointConfig(verify=Verify.none))
    assert store.latest() == step(copied, 6)
    store.config.verify = Verify.small
    assert store.latest() == step(copied, 4)
    assert "step_00000006: damaged: digests.json is missing; set aside" in capsys.readouterr().err
    (step(copied, 4) / DIGESTS).rename(step(copied, 2) / DIGESTS)
    with pytest.raises(DamagedCheckpoint, match=r"step_00000004: damaged: digests.json is missing"):
        require_intact(step(copied, 4), Verify.small)  # named by init_from
    (step(copied, 2) / DIGESTS).unlink()
    shutil.rmtree(step(copied, 4))
    assert store.latest() == step(copied, 2)


def test_checkpoints_without_digests_are_taken_and_what_cannot_be_read_of_them_is_one_line(copied, capsys):
    checkpoint = step(copied, 6)
    for number in (2, 4, 6):
        (step(copied, number) / DIGESTS).unlink()
    assert Store(copied / "checkpoints", CheckpointConfig()).latest() == checkpoint
    assert f"WARNING: {checkpoint}: has no digests.json" in capsys.readouterr().err
    for path in files(checkpoint):
        path.write_bytes(b"\x80\x04no checkpoint")
    for read in (read_progress, read_model_config, Store.loader_states):
        with pytest.raises(Exception, match=r"^/[^\n]*step_00000006: [^\n]*cannot be read[^\n]*$"):
            read(checkpoint)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_whose_newest_checkpoint_was_damaged_ends_as_if_it_were_not(distributed, finished, tmp_path, engine):
    shutil.copytree(finished[engine], tmp_path / engine, symlinks=True)
    flip_middle(a_tensor_file(step(tmp_path / engine, 6)))
    with (tmp_path / engine / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo\n[]\n{"loss": 1}\n\xff\xfe\n')
    outcomes = distributed(2, run, tmp_path / engine, engine)
    assert all(outcome.whole for outcome in outcomes)
    said = outcomes[0].said
    assert "step_00000006: damaged: " in said and "resuming from" in said and "at step 4" in said
    assert "metrics.jsonl: 4 of its 10 lines cannot be read and are left out" in said
    straight = json.loads((step(finished[engine], 6) / DIGESTS).read_text())
    again = json.loads((step(tmp_path / engine, 6) / DIGESTS).read_text())
    tensors = [name for name in straight if name.endswith((".distcp", ".safetensors"))]
    assert tensors and all(straight[name] == again[name] for name in tensors)
    assert outcomes[0].losses == logged(finished[engine])


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_person_named_is_refused_when_it_is_damaged(distributed, finished, tmp_path, engine):
    shutil.copytree(finished[engine], tmp_path / "start", symlinks=True)
    flip_middle(a_tensor_file(step(tmp_path / "start", 6)))
    outcome = distributed(1, run, tmp_path / "new", engine, None, {"init_from": str(tmp_path / "start")})[0]
    name = a_tensor_file(step(tmp_path / "start", 6)).name
    assert f"step_00000006: damaged: {name} does not have the digest" in outcome.error
    assert outcome.status == 2
    assert step(tmp_path / "start", 6).exists()


def test_a_missing_random_state_is_damage_in_the_layout_that_wrote_it(copied, monkeypatch):
    (step(copied, 6) / "random_00001.pt").unlink()
    monkeypatch.setattr(platform, "rank", lambda: 1)
    monkeypatch.setattr(platform, "world_size", lambda: 4)
    restore_random_state(step(copied, 6))
    monkeypatch.setattr(platform, "world_size", lambda: 2)
    with pytest.raises(DamagedCheckpoint, match=r"step_00000006: damaged: random_00001\.pt is missing"):
        restore_random_state(step(copied, 6))
    (step(copied, 6) / "random_00000.pt").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step_00000006: damaged: random_00000\.pt cannot be read"):
        restore_random_state(step(copied, 6))


def test_only_what_is_asked_for_is_looked_at(copied):
    flip_middle(step(copied, 6) / "loader_00000.pt")
    require_intact(step(copied, 6), Verify.all, only=("model.pt", "*.safetensors"), together=False)
    flip_middle(step(copied, 6) / "model.pt")
    with pytest.raises(DamagedCheckpoint, match=r"model\.pt"):
        require_intact(step(copied, 6), Verify.all, only=("model.pt", "*.safetensors"), together=False)
