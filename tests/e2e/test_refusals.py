"""What the user got wrong is said in one line, with exit status 2 and no stack trace."""

from __future__ import annotations

import shutil

import pytest

from tests.e2e.conftest import Runs


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Runs:
    runs = Runs(world, tmp_path_factory.mktemp("trained"))
    runs.finish("run=start", "schedule.steps=0")
    return runs


def refusal(runs: Runs, *overrides: str, ranks: int = 1) -> str:
    err = runs.finish(*overrides, ranks=ranks, status=2)
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    _, error, line = lines[0].partition("error: ")
    assert error
    return line


def test_shards_that_are_not_there(trained):
    line = refusal(trained, "run=nodata", "data.path=/nowhere/text")
    assert "/nowhere/text" in line


def test_shards_that_are_not_there_on_two_ranks_are_reported_once(trained):
    line = refusal(trained, "run=nodata2", "data.path=/nowhere/text", "parallel.pipeline=2", ranks=2)
    assert "/nowhere/text" in line


def test_a_checkpoint_of_another_architecture(trained):
    start = trained.folder / "start"
    line = refusal(trained, "run=other", f"init_from={start}", "model.thinker.moe_intermediate_size=96")
    assert "model.thinker.moe_intermediate_size is 64, the recipe's is 96" in line


def test_a_run_that_was_made_with_another_seed(trained):
    line = refusal(trained, "run=start", "schedule.steps=3", "seed=8")
    assert f"{trained.folder}/start: was made with seed=1234, now it is 8; give another run=" in line


def test_a_checkpoint_with_a_damaged_file(trained, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree((trained.folder / "start" / "checkpoints" / "latest").resolve(), damaged / "step_00000000")
    for part in (damaged / "step_00000000").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    start = f"init_from={damaged / 'step_00000000'}"
    line = refusal(trained, "run=damaged", start)
    assert "step_00000000: damaged: __0_0.distcp has 1000 bytes, not " in line
    line = refusal(trained, "run=unseen", start, "checkpoint.verify=none")
    assert "step_00000000: this checkpoint cannot be read, use another: " in line


def test_a_checkpoint_that_does_not_say_of_what_it_is(trained, tmp_path):
    unnamed = tmp_path / "step_00000000"
    shutil.copytree((trained.folder / "start" / "checkpoints" / "latest").resolve(), unnamed)
    (unnamed / "model.pt").unlink()
    refused = refusal(trained, "run=unnamed", f"init_from={unnamed}", "checkpoint.verify=none")
    assert "model.pt cannot be read" in refused


def test_a_tokenizer_larger_than_the_vocabulary(trained):
    line = refusal(trained, "run=vocab", "model.vocab_size=256")
    assert "320 tokens, more than model.vocab_size=256" in line


def test_a_chat_template_that_its_tokenizer_does_not_serve(trained):
    line = refusal(trained, "run=template", "data.chat_template=qwen3_5")
    assert "models are served with it; set data.chat_template=chatml" in line


def test_a_layout_larger_than_the_world_says_how_to_launch_it(trained):
    assert "omni-train launch 2 …" in refusal(trained, "run=layout", "parallel.tensor=2")
