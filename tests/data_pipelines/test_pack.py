"""A manifest becomes the same shards however it is packed: by more processes, or in two goes with a kill between."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from omni_train.data.samples.sources import open_source
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.pack import Job, pack
from omni_train.data_pipelines.pack import manifest as module
from omni_train.data_pipelines.rehearsal import tokenizer as rehearsal_tokenizer
from omni_train.data_pipelines.shards import digest
from omni_train.errors import UserError
from omni_train.locks import DirectoryLock
from omni_train.recipe.schema import DataConfig, ModelConfig, SourceConfig


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "tokenizer"
    rehearsal_tokenizer.train(["what is said here", "red", "one two three"], folder, 300)
    return folder


def chat(*parts, answer="red", language="en") -> dict:
    content = [*parts, {"type": "text", "text": "what is said here"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": {"language": language}}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Texts, sounds and images, and six kinds of line that cannot be used."""
    folder = tmp_path_factory.mktemp("manifest")
    draw = np.random.default_rng(3)
    lines = []
    for i in range(97):
        if i % 3 == 0:
            wave = draw.normal(0, 0.1, 1600 + 37 * i).astype(np.float32)
            soundfile.write(folder / f"{i}.wav", wave, 16000)
            lines.append(chat({"type": "audio", "audio": f"{i}.wav"}, language="de"))
        elif i % 3 == 1:
            Image.fromarray(draw.integers(0, 255, (40 + i, 70, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            lines.append(chat({"type": "image", "image": f"{i}.png"}))
        else:
            lines.append(chat(answer=f"one two three {i}"))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(40))
    lines[11] = chat({"type": "audio", "audio": "absent.flac"})
    lines[23] = chat({"type": "image", "image": "broken.png"})
    lines[35] = {"messages": [{"role": "robot", "content": "x"}]}
    lines[47] = chat(answer="one " * 500)
    text = [json.dumps(line) for line in lines]
    text[59] = "{"
    file = folder / "all.jsonl"
    text[13:13] = ["", "   "]  # lines of the file, though nothing is on them
    file.write_text("\n".join(text) + "\n\n")
    return file


OPTIONS = {"model": "tiny", "row_tokens": 400, "shard_samples": 7, "val_fraction": 0.2}


@pytest.fixture(scope="module")
def packed(manifest, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    pack(manifest, out, tokenizer, processes=1, **OPTIONS)
    return out


def contents(out: Path) -> dict[str, str]:
    files = [file for file in out.rglob("*") if file.is_file() and ".packed" not in file.parts]
    return {str(file.relative_to(out)): digest([file]) for file in files if file.suffix not in (".sqlite", ".md")}


def test_what_cannot_be_used_is_written_down_with_its_line_and_reason(packed):
    refused = [json.loads(line) for line in (packed / "refused.jsonl").read_text().splitlines()]
    found = {line["line"]: line["reason"] for line in refused}
    assert found == {
        12: "media_missing",
        26: found[26],
        38: "unknown_role",
        50: "too_long",
        62: "broken_json",
    }
    assert found[26].startswith("image_")
    assert refused[0]["files"] == ["absent.flac"]


def test_the_rest_is_in_the_shards_and_in_the_statistics(packed):
    splits = {name: open_source(SourceConfig(str(packed)), name, training=False) for name in ("train", "val")}
    assert {name: len(split) > 5 for name, split in splits.items()} == {"train": True, "val": True}
    assert sum(map(len, splits.values())) == 92
    groups = json.loads((packed / "statistics.json").read_text())["groups"]
    assert groups["audio de"]["samples"] == 33
    assert groups["audio de"]["audio_seconds"] == pytest.approx(
        sum((1600 + 37 * i) // 160 for i in range(0, 97, 3)) / 100
    )
    assert groups["image en"]["vision_tokens"] > 0
    for picture in ("lengths.png", "durations.png"):
        assert Image.open(io.BytesIO((packed / picture).read_bytes())).size[0] > 100


def test_more_processes_give_the_same_bytes(packed, manifest, tokenizer, tmp_path):
    pack(manifest, tmp_path / "out", tokenizer, processes=3, **OPTIONS)
    assert contents(tmp_path / "out") == contents(packed)


def test_killed_and_started_again_it_gives_the_same_bytes(packed, manifest, tokenizer, tmp_path):
    out = tmp_path / "out"
    words = [f"{key}={value}" for key, value in OPTIONS.items()]
    command = [sys.executable, "-m", "omni_train", "data", "pack", f"manifest={manifest}", f"out={out}"]
    process = subprocess.Popen(
        [*command, f"tokenizer={tokenizer}", "processes=1", *words],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = {file.name: file.stat().st_mtime_ns for file in (out / ".packed").glob("*-*.json")}
    assert made and not (out / "statistics.json").exists()
    pack(manifest, out, tokenizer, processes=2, **OPTIONS)
    assert contents(out) == contents(packed)
    assert all((out / ".packed" / name).stat().st_mtime_ns == when for name, when in made.items())


def test_a_folder_of_something_else_or_of_other_settings_is_refused(packed, manifest, tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        pack(manifest, tmp_path, tokenizer, **OPTIONS)
    with pytest.raises(UserError, match="is no folder"):
        pack(manifest, tmp_path / "mine.txt", tokenizer, **OPTIONS)
    with pytest.raises(UserError, match="another row_tokens"):
        pack(manifest, packed, tokenizer, **OPTIONS | {"row_tokens": 512})


def test_a_folder_in_which_another_command_is_at_work_is_refused(packed, manifest, tokenizer):
    with (
        DirectoryLock(packed / ".packed", remedy=""),
        pytest.raises(UserError, match="is at work here; wait for it, stop it, or name another folder"),
    ):
        pack(manifest, packed, tokenizer, **OPTIONS)
    pack(manifest, packed, tokenizer, **OPTIONS)
    assert not list((packed / ".packed").glob("*.partial"))


def test_the_speech_of_a_sample_is_packed_with_it_and_what_has_no_meaning_refused(tokenizer, tmp_path):
    wave = np.random.default_rng(5).normal(0, 0.1, 24000 * 3).astype(np.float32)
    soundfile.write(tmp_path / "said.flac", wave, 24000)
    soundfile.write(tmp_path / "another.wav", wave[:24000], 24000)
    (tmp_path / "empty.wav").write_bytes(b"")
    heard = {"type": "audio", "audio": "said.flac"}
    lines = [
        {"text": "one two three", "speech": "said.flac"},
        chat(heard) | {"speech": "said.flac"},
        {"text": "one", "speech": "nowhere.wav"},
        {"text": "one", "speech": "empty.wav"},
        {"text": "one", "speech": 7},
        {"text": "one", "speach": "said.flac"},
        {"text": "one", "audio": "said.flac"},
        chat(heard | {"strat": 1.0}),
        {"text": "one", "speech": "said.flac", "voice": {"speech": "another.wav", "name": "anna"}},
        {"text": "one", "speech": "said.flac", "voice": {"speech": "empty.wav"}},
        {"text": "one", "speech": "said.flac", "voice": {"speech": "said.flac"}},
    ]
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pack(manifest, tmp_path / "out", tokenizer, processes=1, **OPTIONS | {"val_fraction": 0.0})
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert {line["line"]: line["reason"] for line in refused} == {
        3: "media_missing",
        4: "audio_empty",
        5: "unknown_schema",
        6: "unknown_key_speach",
        7: "unknown_key_audio",
        8: "unknown_key_strat",
        10: "audio_empty",
        11: "voice_is_speech",
    }
    packed = {}
    for shard in sorted((tmp_path / "out").glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            packed |= {member.name: tar.extractfile(member).read() for member in tar}
    files = {0: ["json", "0.flac"], 1: ["json", "0.flac"], 8: ["json", "0.flac", "1.wav"]}
    assert list(packed) == [f"{key:09d}.{file}" for key, those in files.items() for file in those]
    fields = [json.loads(packed[f"{key:09d}.json"]) for key in files]
    assert packed["000000000.0.flac"] == (tmp_path / "said.flac").read_bytes()
    assert packed["000000008.1.wav"] == (tmp_path / "another.wav").read_bytes()
    assert [one["speech"] for one in fields] == ["0.flac"] * 3
    assert fields[-1]["voice"] == {"speech": "1.wav", "name": "anna"}
    groups = json.loads((tmp_path / "out" / "statistics.json").read_text())["groups"]
    assert sum(group["speech_seconds"] for group in groups.values()) == pytest.approx(9.0)


def packed_lines(folder: Path, tokenizer: Path, lines: list[str]) -> tuple[Path, dict[int, str]]:
    """Where the lines of a manifest were packed, and the reasons of those that were refused."""
    (folder / "all.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    pack(folder / "all.jsonl", folder / "out", tokenizer, processes=1, **OPTIONS | {"val_fraction": 0.0})
    refused = [json.loads(line) for line in (folder / "out" / "refused.jsonl").read_text("utf-8").splitlines()]
    return folder / "out", {line["line"]: line["reason"] for line in refused}


def test_an_error_that_nobody_thought_of_costs_its_line(tokenizer, tmp_path, monkeypatch):
    def divide(*args, **kwargs):
        raise ZeroDivisionError

    job = Job(tmp_path / "all.jsonl", (tmp_path,), None, tokenizer, ModelConfig(), DataConfig(row_tokens=400))
    monkeypatch.setattr(module, "sequences_of", divide)
    refused = module.read_line(4, b'{"text": "one"}', Tokenizer(tokenizer), job)
    assert refused == module.Refused(5, "unexpected_ZeroDivisionError", [])


def test_a_line_of_any_kind_costs_that_line_alone(tokenizer, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")

    def sound(name: str) -> str:
        return json.dumps(chat({"type": "audio", "audio": name}))

    lines = {
        json.dumps({"text": "one"}): None,
        '{"text": "two", "meta": {"title": "half \\ud83d"}}': "broken_json",
        sound("half\ud83d.wav"): "broken_json",
        '{"text": "two", "half\\ud83d": 1}': "broken_json",
        '{"text": "two", "meta": {"gain": NaN}}': "broken_json",
        '{"text": "two", "meta": ' + "[" * 30_000 + "]" * 30_000 + "}": "broken_json",
        '{"text": "two", "meta": {"n": ' + "9" * 5000 + "}}": "broken_json",
        '{"text": "two", "text": "three"}': "duplicate_key",
        sound("nul\0.wav"): "media_unreadable",
        sound("long" * 100): "media_unreadable",
        sound("folder.wav"): "media_unreadable",
        sound("pipe.wav"): "media_unreadable",
        sound(""): "media_unreadable",
        '{"conversations": [{"from": "human", "value": "one"}]}': "sharegpt_conversations",
        json.dumps({"text": "three", "a|b\n": 1}): "unknown_key_a_b_",
        json.dumps({"text": "two"}): None,
    }
    out, refused = packed_lines(tmp_path, tokenizer, list(lines))
    assert refused == {number: reason for number, reason in enumerate(lines.values(), start=1) if reason}
    with tarfile.open(out / "train-00000.tar") as tar:
        assert tar.getnames() == ["000000000.json"]
    assert json.loads((out / "statistics.json").read_text())["groups"]["text unknown"]["samples"] == 2


def test_only_the_files_of_a_tokenizer_are_copied_from_its_folder(tokenizer, tmp_path):
    whole = tmp_path / "model"
    shutil.copytree(tokenizer, whole)
    for name in ("model.safetensors", "config.json", "README.md"):
        (whole / name).write_text("large")
    (whole / "chat_template.jinja").write_text("{{ messages }}")
    out, _ = packed_lines(tmp_path, whole, ['{"text": "one"}'])
    copied = {file.name for file in (out / "tokenizer").iterdir()}
    assert copied == {file.name for file in tokenizer.iterdir()} | {"chat_template.jinja"}


def test_languages_have_one_name_each_in_the_statistics_and_cannot_break_its_page(tokenizer, tmp_path):
    named = ["zh_CN", "ZH", "cmn", "en|\n| evil", "Chinese", None]
    out, _ = packed_lines(tmp_path, tokenizer, [json.dumps({"text": "one", "meta": {"language": n}}) for n in named])
    groups = json.loads((out / "statistics.json").read_text())["groups"]
    assert {name: group["samples"] for name, group in groups.items()} == {
        "text zh": 3,
        "text not understood": 2,
        "text unknown": 1,
    }
    rows = [line for line in (out / "statistics.md").read_text().splitlines() if line.startswith("| text")]
    assert sorted(row.split(" | ")[1] for row in rows) == ["not understood", "unknown", "zh"]
    assert len({row.count("|") for row in rows}) == 1


def test_reasoning_is_packed_for_a_template_that_writes_it(tokenizer, tmp_path):
    line = chat(answer="red")
    line["messages"][1]["reasoning_content"] = "one two three"
    (tmp_path / "all.jsonl").write_text(json.dumps(line) + "\n")
    options = OPTIONS | {"val_fraction": 0.0, "processes": 1}
    with pytest.raises(UserError, match=r"unwritten_reasoning 1 \(ChatML has no place .* set chat_template=qwen3_5\)"):
        pack(tmp_path / "all.jsonl", tmp_path / "chatml", tokenizer, **options)
    pack(tmp_path / "all.jsonl", tmp_path / "out", tokenizer, chat_template="qwen3_5", **options)
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        assert json.load(tar.extractfile("000000000.json"))["messages"] == line["messages"]
    with pytest.raises(UserError, match="chat_template=qwen: must be one of chatml, qwen3_5"):
        pack(tmp_path / "all.jsonl", tmp_path / "other", tokenizer, chat_template="qwen", **options)
