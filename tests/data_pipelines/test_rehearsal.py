from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_pipelines import rehearsal
from omni_train.data.chat import chat_tokens
from omni_train.data.loader import build_loader, evaluation_rows
from omni_train.data.sample import Chat, Document, parse_sample
from omni_train.data.tokenizer import CONTROL_TOKENS, Tokenizer
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, LossOn, SourceConfig


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsal") / "set"
    assert rehearsal.build(out)
    return out


def samples(folder: Path, split: str) -> dict:
    found = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = parse_sample(tar.extractfile(member).read())
    return found


def config(built: Path, **changes) -> DataConfig:
    sources = [SourceConfig(str(built / "text"), 0.8), SourceConfig(str(built / "chat"), 0.2)]
    fields = dict(name="rehearsal", path=str(built), sources=sources, tokenizer=str(built / "tokenizer"), workers=0)
    return DataConfig(**fields | dict(row_tokens=2048, shuffle_buffer=50, packing_buffer=64, streams=1) | changes)


def test_every_sample_is_of_the_schema_under_an_ascii_key(built):
    for kind, type_ in (("text", Document), ("chat", Chat)):
        train, held_out = samples(built / kind, "train"), samples(built / kind, "val")
        assert len(held_out) > 200
        assert 7 * len(held_out) < len(train)
        assert not set(train) & set(held_out)
        assert all(isinstance(sample, type_) and sample.meta["source"] for sample in (train | held_out).values())
        assert all(key.isascii() for key in train | held_out)


def test_the_tokenizer_has_exactly_the_ids_asked_for_and_loads_in_transformers(built):
    ours = Tokenizer(built / "tokenizer")
    assert ours.size == 4096
    assert [ours.token_id(name) for name in CONTROL_TOKENS] == list(range(4096 - len(CONTROL_TOKENS), 4096))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(built / "tokenizer")
    assert len(theirs) == 4096
    assert theirs.eos_token == "<|im_end|>"
    for name, sample in list(samples(built / "chat", "val").items())[:40]:
        messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in sample.turns]
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert chat_tokens(sample, ours, LossOn.assistant)[0] == expected, name
    for sample in list(samples(built / "text", "val").values())[:40]:
        assert ours.decode(ours.encode(sample.text)) == sample.text
        assert theirs(sample.text)["input_ids"] == ours.encode(sample.text)


def test_documents_fill_their_rows(built):
    loader = build_loader(config(built, sources=[SourceConfig(str(built / "text"))]), seed=3)
    rows = [next(loader) for _ in range(60)]
    assert sum(int(row.padding.sum()) for row in rows) / (60 * 2048) < 0.03


def test_documents_longer_than_a_row_are_among_them(built):
    loader = build_loader(config(built, sources=[SourceConfig(str(built / "text"))], row_tokens=512), seed=3)
    assert any(next(loader).samples == 0 for _ in range(100))  # the inside of one


def test_both_sources_load_without_a_refusal_and_hold_rows_out(built):
    loader = build_loader(config(built), seed=3)
    assert not any(next(loader).skipped for _ in range(60))
    assert len(evaluation_rows(config(built), rows=16)) == 16


def test_another_build_gives_the_same_bytes(built, tmp_path):
    program = f"from data_pipelines import rehearsal; rehearsal.build({str(tmp_path / 'again')!r})"
    environment = os.environ | {"PYTHONHASHSEED": "101"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    files = sorted(str(file.relative_to(built)) for file in built.rglob("*") if file.is_file())
    again = sorted(str(file.relative_to(tmp_path / "again")) for file in (tmp_path / "again").rglob("*.*"))
    assert set(files) >= {"tokenizer/tokenizer.json", "text/train-00000.tar", "chat/.nv-meta/split.yaml"}
    assert filecmp.cmpfiles(built, tmp_path / "again", files, shallow=False) == (files, [], [])
    assert len(again) >= len(files)


def test_a_complete_set_is_left_as_it_is(built, capsys):
    assert not rehearsal.build(built)
    assert "already holds" in capsys.readouterr().out


def test_something_else_in_the_way_is_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a rehearsal data set"):
        rehearsal.build(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(rehearsal, "write_shards", fail)
    monkeypatch.setattr(rehearsal.text, "read", lambda: ([{"text": "kalan " * 90}], []))
    with pytest.raises(OSError, match="no space"):
        rehearsal.build(tmp_path / "set", vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size=200"):
        rehearsal.build(tmp_path / "set", vocab_size=200)
