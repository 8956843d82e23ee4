"""What a name may lead to: nothing but a regular file of a bounded size, in a folder that the user named."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from omni_train.data.rows.codes import check_codes
from omni_train.data.samples import files
from omni_train.data.samples.chat_template import check_template
from omni_train.data.samples.sources import open_source
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.loader import build_loader
from omni_train.data_pipelines.pack import pack
from omni_train.errors import UserError
from omni_train.interop import folder as interop
from omni_train.recipe.schema import ChatTemplate, DataConfig, SourceConfig
from tests.data.conftest import MODEL
from tests.hostile import confined
from tests.support import bombs
from tests.support.media import sound_file

SOUND = sound_file(np.zeros((1600, 1), np.float32), format="WAV")


def line(name: str) -> str:
    part = [{"type": "audio", "audio": name}]
    return json.dumps({"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "one"}]}) + "\n"


def linked(path: Path, to: str | Path) -> None:
    path.symlink_to(to)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def sized(path: Path, size: int) -> None:
    with path.open("wb") as opened:
        opened.truncate(size)


NAMES = {
    "a device outside": ("/dev/zero", None, "media_outside"),
    "a device by a link": ("zero.wav", lambda folder: linked(folder / "zero.wav", "/dev/zero"), "media_outside"),
    "a file of the system": ("/proc/self/mem", None, "media_outside"),
    "what this process was given": ("/dev/stdin", None, "media_outside"),
    "a file outside": ("../outside.wav", None, "media_outside"),
    "the same by its whole name": ("{outside}", None, "media_outside"),
    "the same by a link": ("a.wav", lambda folder: linked(folder / "a.wav", "../outside.wav"), "media_outside"),
    "the same by a link to its folder": (
        "up/outside.wav",
        lambda folder: linked(folder / "up", ".."),
        "media_outside",
    ),
    "links in a circle": ("a.wav", lambda folder: linked(folder / "a.wav", "a.wav"), "media_unreadable"),
    "a link to nothing": ("a.wav", lambda folder: linked(folder / "a.wav", "b.wav"), "media_missing"),
    "a FIFO": ("a.wav", lambda folder: os.mkfifo(folder / "a.wav"), "media_unreadable"),
    "a socket": ("a.wav", lambda folder: bound(folder / "a.wav"), "media_unreadable"),
    "a folder": (".", None, "media_unreadable"),
    "a zero byte": ("a\0.wav", None, "media_unreadable"),
    "100 GB of nothing": ("a.wav", lambda folder: sized(folder / "a.wav", 100 << 30), "sample_too_large"),
    "a file inside": ("sub/../good.wav", lambda folder: (folder / "sub").mkdir(), None),
    "the same by its whole name, whatever is outside": ("{inside}/good.wav", None, None),
    "a link inside": ("a.wav", lambda folder: linked(folder / "a.wav", "good.wav"), None),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_in_a_manifest_leads_to_a_file_inside_or_costs_its_line(case, within, tokenizer, folder):
    name, make, reason = NAMES[case]
    for file in (folder / "good.wav", folder.parent / "outside.wav"):
        file.write_bytes(SOUND)
    if make:
        make(folder)
    name = name.format(inside=folder, outside=folder.parent / "outside.wav")
    (folder / "all.jsonl").write_text(line("good.wav") + line(name), encoding="utf-8")
    assert within(confined.lines, str(folder / "all.jsonl"), tokenizer) == [None, reason]


def test_media_outside_are_read_where_their_folder_is_named(within, tokenizer, tmp_path, capsys):
    for name in ("all", "one", "two", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.wav").write_bytes(SOUND)
    linked(tmp_path / "alias", tmp_path / "two")
    manifest = tmp_path / "all" / "all.jsonl"
    names = [f"{tmp_path}/one/a.wav", "../two/a.wav", "../other/a.wav", "../alias/a.wav", "../oneself/a.wav"]
    manifest.write_text("".join(map(line, names)))
    roots = f"{tmp_path}/one,{tmp_path}/alias"
    reasons = within(confined.lines, str(manifest), tokenizer, tuple(roots.split(",")))
    assert reasons == [None, None, "media_outside", None, "media_outside"]
    options = {"model": "tiny", "row_tokens": 400, "val_fraction": 0.0, "processes": 1}
    pack(manifest, tmp_path / "out", Path(tokenizer), roots=roots, **options)
    assert "refused: media_outside 2 (media that lie outside the manifest's folder: " in capsys.readouterr().out
    with pytest.raises(UserError, match="with another roots"):
        pack(manifest, tmp_path / "out", Path(tokenizer), **options)
    with pytest.raises(UserError, match="roots=nowhere: no such folder"):
        pack(manifest, tmp_path / "out", Path(tokenizer), roots="nowhere", **options)


def test_files_of_a_sample_are_bounded_together(within, tokenizer, folder):
    for name in ("a.wav", "b.wav"):
        (folder / name).write_bytes(SOUND)
    both = json.loads(line("a.wav"))
    both["messages"][0]["content"].append({"type": "audio", "audio": "b.wav"})
    (folder / "all.jsonl").write_text(line("a.wav") + json.dumps(both))
    most = len(SOUND) * 3 // 2
    assert within(confined.lines, str(folder / "all.jsonl"), tokenizer, max_sample_bytes=most) == [
        None,
        "sample_too_large",
    ]


def test_a_file_that_is_put_in_anothers_place_is_not_read(tmp_path, monkeypatch):
    """What was looked at is what was opened: another may stand under its name by then."""
    (tmp_path / "a").write_bytes(b"inside")
    fstat = os.fstat

    def swapped(descriptor):
        (tmp_path / "a").unlink(missing_ok=True)
        os.symlink("/dev/zero", tmp_path / "a")
        monkeypatch.setattr(os, "fstat", fstat)
        return fstat(descriptor)

    monkeypatch.setattr(os, "fstat", swapped)
    assert files.read_regular(tmp_path / "a", 100) == b"inside"


@pytest.mark.parametrize("grown", [b"and more", b"", b"and more" * 1000])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, grown):
    (tmp_path / "a").write_bytes(b"whole")
    with files.open_regular(tmp_path / "a") as opened:
        size = os.fstat(opened.fileno()).st_size
        read = opened.read

        class Growing:
            name, fileno = opened.name, opened.fileno

            def read(self, most):
                assert most == size + 1
                with (tmp_path / "a").open("r+b") as other:
                    other.truncate(3)
                    other.seek(0, os.SEEK_END)
                    other.write(grown)
                return read(most)

        with pytest.raises(OSError, match="its size changes while it is read"):
            files.read_whole(Growing(), 100)
    with pytest.raises(OSError, match="size changes"):  # it has no size
        files.read_regular("/proc/self/status", 1 << 20)


def test_a_manifest_is_a_regular_file(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular"),
        (Path("/dev/zero"), "not a"),
    ):
        with pytest.raises(UserError, match=f"manifest={path}: {why}"):
            pack(path, tmp_path / "out", Path(tokenizer), model="tiny")
    with pytest.raises(UserError, match="No such file"):
        pack(tmp_path / "nowhere", tmp_path / "out", Path(tokenizer), model="tiny")


def test_files_beside_the_shards_are_bounded(tokenizer, tmp_path):
    folder = bombs.shards(tmp_path / "shards", bombs.SAMPLE)
    data = DataConfig(
        sources=[SourceConfig(str(folder))], tokenizer=tokenizer, row_tokens=64, codec="0" * 64, streams=1
    )
    sized(folder / "codec.json", 10 << 30)
    with pytest.raises(UserError, match="has no codes"):
        check_codes(data)
    sized(folder / ".nv-meta" / ".info.json", 10 << 30)
    with pytest.raises(UserError, match=r"\.info\.json is no file of at most 1,073,741,824 bytes"):
        open_source(SourceConfig(str(folder)), "train", training=True)


@pytest.mark.parametrize("suffix", [".tar", ".tar.idx"])
def test_a_shard_that_is_a_pipe_is_no_shard(suffix, tokenizer, tmp_path):
    folder = bombs.shards(tmp_path / "shards", bombs.SAMPLE)
    (folder / f"train-00000{suffix}").unlink()
    os.mkfifo(folder / f"train-00000{suffix}")
    data = DataConfig(sources=[SourceConfig(str(folder))], tokenizer=tokenizer, row_tokens=64, streams=1, workers=0)
    with pytest.raises(UserError, match=rf"train-00000{suffix} is missing"):
        build_loader(data, MODEL, seed=1)


def test_a_tokenizer_is_bounded(tmp_path):
    sized(tmp_path / "tokenizer.json", 10 << 30)
    with pytest.raises(UserError, match=r"tokenizer\.json is not readable .*10,737,418,240 bytes are more than"):
        Tokenizer(tmp_path)


def test_the_headers_of_a_foreign_model_are_bounded(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="a header of 1,152,921,504,606,846,976 bytes; must be a safetensors file"):
        interop.tensor_bytes(tmp_path / "model.safetensors")
    sized(tmp_path / "config.json", 10 << 30)
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(10,737,418,240 bytes are more than"):
        interop.read_json(tmp_path / "config.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="not a regular file"):
        interop.read_json(tmp_path / "pipe.json")


def test_a_chat_template_is_bounded(tmp_path):
    sized(tmp_path / "chat_template.jinja", 10 << 30)
    with pytest.raises(UserError, match=r"chat_template\.jinja: cannot be read .*10,737,418,240 bytes are more"):
        check_template(tmp_path, ChatTemplate.chatml)
