"""What `omni-train data states` refuses before it runs a Thinker, and what it writes of the states."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from omni_train.cli import main
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import write_shard
from omni_train.data_pipelines.states import Batch, StateWriter
from omni_train.data_pipelines.states.contexts import Read
from omni_train.errors import UserError
from omni_train.recipe.schema import Precision, SourceConfig
from omni_train.training.states import _claimed
from tests.support.spoken_shards import spoken_recipe


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    train(["a little text"], folder := tmp_path_factory.mktemp("spoken") / "tokenizer", vocab_size=320)
    return folder


@pytest.fixture
def recipe(tmp_path, tokenizer_folder):
    recipe = spoken_recipe(tmp_path / "data")
    recipe.data.tokenizer = str(tokenizer_folder)
    for source in ("talk", "read"):
        write_shard(tmp_path / "data" / source / "train-00000.tar", [("a", {"text": "b"})])
    recipe.talker_training = replace(recipe.talker_training, thinker="ab" * 32)
    return recipe


def test_another_network_is_refused(capsys, tmp_path):
    words = ["stage=text_pretrain", "data.path=nowhere", f"out={tmp_path}"]
    assert main(["data", "states", *words]) == 2
    assert "network=thinker: only network=talker reads states of a Thinker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("paths", "out", "message"),
    [
        (["talk", "gone"], "out", r"data.sources: no folder \S+/gone; states are written of shards in a local folder"),
        (["talk", "other/talk"], "out", r"\S+/talk and \S+/talk would both become \S+out/talk; write their states one"),
        (["talk"], "data", r"out=\S+data: holds \S+talk itself, whose shards stay as they are; name another"),
        (["other"], "out", r"data=\S+other: no shards \(\*\.tar\) here"),
    ],
)
def test_sources_that_cannot_be_written_are_refused(recipe, tmp_path, paths, out, message):
    (tmp_path / "data" / "other" / "talk").mkdir(parents=True)
    recipe.data.sources = [SourceConfig(str(tmp_path / "data" / path)) for path in paths]
    with pytest.raises(UserError, match=message):
        _claimed(recipe, tmp_path / out)


def test_a_folder_goes_on_with_the_same_thinker_and_settings_alone(recipe, tmp_path):
    out = tmp_path / "out"
    folders = _claimed(recipe, out)
    assert [folder.making.out for folder in folders] == [out / "talk", out / "read"]
    assert _claimed(recipe, out) == folders
    with pytest.raises(UserError, match="stored there with another thinker; name another folder, or remove it"):
        _claimed(replace(recipe, talker_training=replace(recipe.talker_training, thinker="cd" * 32)), out)
    recipe.data.media.video_fps = 5.0
    with pytest.raises(UserError, match=r"stored there with another data\.media\.video_fps"):
        _claimed(recipe, out)


def sample(length: int, size: int = 10) -> Read:
    """A sample whose sequence has `length` tokens, none where that is 0."""
    tokens = np.zeros(length, np.int32)
    sequence = TokenSequence(tokens, tokens) if length else None
    return Read("key", {"json": b" " * size}, None, sequence, np.arange(min(length, 2)))


def test_samples_share_rows_up_to_the_bounds_of_a_pass():
    batch, sizes = Batch(), (32, 8, 2)
    for length in (17, 9, 0, 8, 16):  # 24 + 8, 16 + 16
        assert batch.takes(sample(length), *sizes)
    assert batch.rows == [[0, 3], [1, 4]]
    assert not batch.takes(sample(1), *sizes)
    assert batch.takes(sample(0, 1 << 28), *sizes)
    assert not batch.takes(sample(0), *sizes)  # it holds too many bytes


@pytest.mark.parametrize(
    ("precision", "largest", "dtype"),
    [(Precision.fp32, 3.1, np.float32), (Precision.bf16, -65504.0, np.float16), (Precision.bf16, 66048.0, np.float32)],
)
def test_states_are_written_without_loss(recipe, precision, largest, dtype):
    states = np.array([[0.15625, largest], [-2.5, 7.0]], np.float32)
    written = np.load(io.BytesIO(StateWriter(replace(recipe, precision=precision), 1)._file(states)))
    assert written.dtype == dtype
    np.testing.assert_array_equal(written.astype(np.float32), states)
