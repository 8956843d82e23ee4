"""Kinds of rows: those of the package, and one that a module of somebody's own adds."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from omni_train import plugins
from omni_train.data import transfer, workers
from omni_train.data.rows import kinds
from omni_train.data.rows.base import RowKind
from omni_train.data.rows.batch import MODALITIES, PackedBatch, SpeechRow, WaveRow
from omni_train.data.rows.kinds import check_rows, held_out, kind_of, register
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import EvaluationConfig
from tests.data.conftest import MODEL
from tests.data.test_loader import take, through_a_file

LETTERS = '''
"""Rows of the letters of documents, a batch of numbers."""

from dataclasses import dataclass

import torch

from omni_train.data.rows.base import Row, RowKind
from omni_train.data.rows.kinds import register
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.refusals import refuse


@dataclass
class LetterRow(Row):
    letters: torch.Tensor
    drawn: torch.Tensor


@dataclass
class Letters:
    text: str
    drawn: int
    media_bytes: int = 0

    def __len__(self):
        return len(self.text)


class LetterRows(RowKind):
    name, row = "letters", LetterRow

    def read(self, sample, parts, reading):
        if "7:" in sample.text:  # of a document's number
            raise SampleError("no_letters")
        return [Letters(sample.text[: reading.data.row_tokens], reading.draw)]

    def row_maker(self, tokenizer, data):
        def make(pieces):
            letters = torch.tensor([ord(letter) for piece in pieces for letter in piece.text])
            return LetterRow(letters, torch.tensor([piece.drawn for piece in pieces]), samples=len(pieces))

        return make

    def held_out(self, data, model, evaluation, *, split="val", data_rank=0, data_world_size=1, refused=None):
        return [data.name, split][data_rank::data_world_size]

    def check(self, recipe):
        super().check(recipe)
        if recipe.data.alignment != 1:
            refuse(recipe, "data.alignment", "letters stand side by side; set 1")


register(LetterRows())
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """A module of somebody's own that this process and its workers load because the environment names it."""
    (tmp_path / "letters_of_a_test.py").write_text(LETTERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "letters_of_a_test")
    monkeypatch.setattr(workers, "_server", None)
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    plugins.load.cache_clear()
    kind_of("letters")
    yield sys.modules["letters_of_a_test"]
    del sys.modules["letters_of_a_test"]
    plugins.load.cache_clear()


@pytest.fixture
def letters(config, plugin):
    return dataclasses.replace(
        config, rows="letters", sources=config.sources[:1], alignment=1, max_skip_fraction=1.0, streams=2
    )


def assert_same(rows, others):
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert torch.equal(row.letters, other.letters) and torch.equal(row.drawn, other.drawn)
        assert (row.samples, row.skipped) == (other.samples, other.skipped)


def test_a_kind_of_somebodys_own_is_read_in_workers_too_and_resumes(letters, plugin):
    rows = take(build_loader(letters, MODEL, seed=5), 20)
    assert {type(row) for row in rows} == {plugin.LetterRow}
    assert all(0 < len(row.letters) <= letters.row_tokens for row in rows)
    assert sum((Counter(row.skipped) for row in rows), Counter())["no_letters"] > 0
    loader = build_loader(dataclasses.replace(letters, workers=2), MODEL, seed=5)
    assert_same(take(loader, 8), rows[:8])
    state = through_a_file(loader.state_dict())
    loader.close()
    resumed = build_loader(letters, MODEL, seed=5)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 12), rows[8:])


def test_a_kind_of_somebodys_own_is_evaluated_and_checks_its_own_keys(letters, plugin):
    (row, *_) = evaluation_rows(letters, MODEL, rows=3)
    assert isinstance(row, plugin.LetterRow)
    assert held_out(letters, MODEL, EvaluationConfig(), data_rank=1, data_world_size=2) == ["val"]
    recipe = load_recipe(["data.rows=letters"])
    with pytest.raises(UserError, match=r"^data\.alignment=16: letters stand side by side; set 1$"):
        check_rows(recipe)
    recipe.data.alignment = 1
    check_rows(recipe)


def test_a_kind_that_there_is_not_is_refused_by_those_that_there_are():
    with pytest.raises(UserError) as refused:
        check_rows(load_recipe(["data.rows=poems"]))
    expected = "data.rows=poems: no such kind of row; choose one of chats, transcripts, crops, speech"
    assert str(refused.value) == expected


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="chats is registered already"):
        register(kind_of("chats"))


@pytest.mark.parametrize(
    ("body", "why"),
    [(None, "ModuleNotFoundError: No module"), ("1 / 0", "ZeroDivisionError: "), ("exit(0)", "SystemExit: 0")],
)
def test_a_plugin_that_cannot_be_imported_is_named(tmp_path, monkeypatch, body, why):
    if body:
        (tmp_path / "broken_of_a_test.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.setenv(plugins.VARIABLE, "json, broken_of_a_test")
    plugins.load.cache_clear()
    try:
        with pytest.raises(UserError) as refused:
            kind_of("chats")
    finally:
        plugins.load.cache_clear()
    assert str(refused.value).startswith(f"OMNI_TRAIN_PLUGINS: broken_of_a_test cannot be imported: {why}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["chats", "crops"])
def test_only_transcripts_are_augmented(name):
    recipe = load_recipe([f"data.rows={name}"])
    recipe.data.augmentation = load_recipe(["data=aut_shards"]).data.augmentation
    with pytest.raises(UserError, match=rf"^data\.augmentation=.*: data\.rows={name} are read as they are; set null$"):
        check_rows(recipe)
    recipe.data.rows = "transcripts"
    check_rows(recipe)


def test_the_tables_kinds_are_whole():
    assert [(kind.name, kind.row) for kind in kinds._KINDS.values()] == [
        ("chats", PackedBatch),
        ("transcripts", PackedBatch),
        ("crops", WaveRow),
        ("speech", SpeechRow),
    ]
    assert all(isinstance(kind, RowKind) for kind in kinds._KINDS.values())


def packed() -> PackedBatch:
    whole = torch.arange(8)
    boundaries, none = torch.tensor([0, 8], dtype=torch.int32), torch.zeros(8, dtype=torch.bool)
    row = PackedBatch(whole, whole, torch.arange(8.0), whole.expand(3, 8), boundaries, none, samples=2)
    row.padding[6:] = True
    row.modality[3:5] = MODALITIES.index("image")
    row.mel, row.patches = torch.ones(4, 128), torch.ones(3, 7, dtype=torch.uint8)
    return row


def test_what_was_prepared_for_a_row_does_not_travel():
    row = WaveRow(torch.ones(2, 4), torch.ones(2), torch.ones(2), samples=2, prepared={"teacher": torch.ones(3)})
    mine, theirs = transfer.channel()
    transfer.send(mine, row)
    for arrived in (pickle.loads(pickle.dumps(row)), transfer.receive(theirs)[0]):
        assert arrived.prepared == {}
        assert torch.equal(arrived.waveform, row.waveform) and arrived.samples == 2
    assert row.prepared["teacher"].sum() == 3


def test_later_stages_have_a_row_without_its_media():
    row = packed()
    rest = row.without_media()
    assert (rest.mel.shape, rest.patches.shape) == ((0, 128), (0, 0))
    assert all(getattr(rest, name).numel() <= 1 for name in PackedBatch.MEDIA)
    assert all(getattr(rest, name) is getattr(row, name) for name in PackedBatch.TENSORS)
    assert (rest.samples, row.mel.shape) == (2, (4, 128))


def test_tokens_are_counted_by_modality_without_padding():
    tokens = packed().tokens_by_modality()
    assert dict(zip(MODALITIES, tokens.tolist(), strict=True)) == dict.fromkeys(MODALITIES, 0) | {"text": 4, "image": 2}
