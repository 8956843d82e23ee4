"""Codes beside speech: the same shards however they are made, and read by whoever names the codec that made them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from omni_train.data.rows.codes import CODES, VOICE_CODES, read_codes
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.sources import open_source
from omni_train.data.stream.loader import build_loader
from omni_train.data_pipelines.codes import extract
from omni_train.data_pipelines.rehearsal import tokenizer as rehearsal_tokenizer
from omni_train.data_pipelines.shards import digest, index_shards, write_shards
from omni_train.errors import UserError
from omni_train.frozen.codec import codec_hash, open_codec, write_codes
from omni_train.models.codec import SpeechCodec
from omni_train.recipe.schema import DataConfig, SourceConfig
from tests.support.codec import CODE2WAV, CODEC, FRAME, MODEL, voice
from tests.support.media import sound_file

SAMPLES = [500 + 173 * n for n in range(23)]
VOICES = {1: 700, 8: 1300, 19: 2500}  # samples whose voice has a reference utterance, and its length


def checkpoint(folder: Path, seed: int, teacher_size: int = 0) -> Path:
    """A codec whose codebooks have seen something, as a run writes it."""
    torch.manual_seed(seed)
    codec = SpeechCodec(CODEC, CODE2WAV, teacher_size).train()
    codec(torch.stack([voice(60 * FRAME, seed) for seed in range(3)]), torch.Generator().manual_seed(seed))
    codec.quantizer.update(torch.Generator().manual_seed(seed))
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in codec.state_dict().items()}, folder / "generator.safetensors"
    )
    torch.save(dataclasses.asdict(MODEL), folder / "model.pt")
    (folder / "metadata.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("codec") / "step_00000001", 1)


def wave(length: int, seed: int) -> bytes:
    return sound_file(voice(length, seed).numpy()[:, None], 24000, "WAV")


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Speech in four shards, one sample without any, one that is damaged, and some with voices, good and bad."""
    folder = tmp_path_factory.mktemp("speech") / "speech"
    samples = [
        (f"s-{n:03d}", {"text": f"word {n}", "speech": "0.wav"}, {"0.wav": wave(length, n)})
        for n, length in enumerate(SAMPLES)
    ]
    for n, length in VOICES.items():
        samples[n][1]["voice"], samples[n][2]["1.wav"] = {"speech": "1.wav"}, wave(length, 100 + n)
    samples[5][1]["voice"] = {"name": "anna"}
    samples[6][1]["voice"], samples[6][2]["1.wav"] = {"speech": "1.wav"}, b"RIFF who?"
    samples[7][1]["voice"] = {"speech": "nowhere.wav"}
    samples.insert(4, ("t-000", {"text": "nobody says this"}))
    samples.insert(9, ("d-000", {"text": "x", "speech": "0.wav"}, {"0.wav": b"RIFF what?"}))
    write_shards(folder, "train", samples[:-6], 3)
    write_shards(folder, "val", samples[-6:], 1)
    index_shards(folder)
    rehearsal_tokenizer.train(["what is said here"], folder / "tokenizer", 270)
    return folder


@pytest.fixture(scope="module")
def coded(speech, codec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("coded") / "out"
    write_codes(speech, str(codec), out, workers=1)
    return out


def contents(out: Path) -> dict[str, str]:
    files = [file for file in out.rglob("*") if file.is_file()]
    return {str(file.relative_to(out)): digest([file]) for file in files if file.suffix != ".sqlite"}


def files_of(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    source = open_source(SourceConfig(str(folder)), split, training=False)
    (reader,) = source.build().dataset.join_readers
    parts = [reader[index]["open"]() for index in range(len(source))]
    return {json.loads(each["json"])["text"]: each for each in parts}


def test_every_sample_keeps_its_files_and_its_speech_gets_the_codecs_codes(speech, codec, coded):
    opened = open_codec(str(codec))
    for split in ("train", "val"):
        before, after = files_of(speech, split), files_of(coded, split)
        assert list(before) == list(after)
        for text, parts in after.items():
            found = {name: parts.pop(name) for name in (CODES, VOICE_CODES) if name in parts}
            assert parts == before[text]
            n = int(text.split()[1]) if text.startswith("word") else None
            lengths = {CODES: SAMPLES[n]} if n is not None else {}
            lengths |= {VOICE_CODES: VOICES[n]} if n in VOICES else {}
            assert set(found) == set(lengths)
            for name, length in lengths.items():
                codes = np.load(io.BytesIO(found[name]))
                assert (codes.dtype, codes.shape) == (np.uint16, (4, -(-length // FRAME)))
                heard, _ = soundfile.read(io.BytesIO(parts["0.wav" if name == CODES else "1.wav"]), dtype="float32")
                np.testing.assert_array_equal(codes, opened.codec.encode(torch.from_numpy(heard)[None])[0])
                np.testing.assert_array_equal(codes, read_codes(found, 4, CODE2WAV.codebook_size, name))


def test_the_folder_and_each_shard_say_whose_codes_they_are(codec, coded):
    record = json.loads((coded / "codec.json").read_text())
    assert record["codec"] == codec_hash(str(codec)) == codec_hash(record["codec"])
    assert record["shards"] == dict.fromkeys(sorted(file.name for file in coded.glob("*.tar")), record["codec"])


def test_what_a_codec_is_called_follows_its_weights_and_sizes_alone(codec, tmp_path):
    same, other = checkpoint(tmp_path / "same", 1), checkpoint(tmp_path / "other", 2)
    assert codec_hash(str(same)) == codec_hash(str(codec)) != codec_hash(str(other))


def test_a_shard_that_breaks_off_is_named(speech, codec, tmp_path):
    shard = shutil.copytree(speech, tmp_path / "speech") / "train-00001.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmembers()[-1].offset_data + 5
    with shard.open("r+b") as file:
        file.truncate(cut)
    with pytest.raises(UserError, match=r"train-00001\.tar: not a complete tar .*; mend it"):
        extract(tmp_path / "speech", str(codec), open_codec, tmp_path / "out", workers=1)


def test_more_processes_give_the_same_bytes(speech, codec, coded, tmp_path):
    write_codes(speech, str(codec), tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(coded)


def test_killed_and_started_again_it_gives_the_same_bytes(speech, codec, coded, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "omni_train", "data", "codes", f"data={speech}", f"codec={codec}", f"out={out}"]
    process = subprocess.Popen([*command, "workers=1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert started
    assert not psutil.wait_procs(started, timeout=60)[1]  # a worker would write beside those of the next command
    made = {file.name: file.stat().st_mtime_ns for file in (out / ".coded").glob("*.tar.json")}
    assert not (out / "codec.json").exists()
    write_codes(speech, str(codec), out, workers=2)
    assert contents(out) == contents(coded)
    assert all((out / ".coded" / name).stat().st_mtime_ns == when for name, when in made.items())
    again = subprocess.run([*command, "workers=1"], capture_output=True, check=True, text=True)
    told = "audio_damaged 1, no_speech 1, voice_audio_damaged 1, voice_media_missing 1"
    assert again.stdout.splitlines()[-1].endswith(f"in 4 shards; without codes: {told}")


def test_a_reference_that_is_too_long_gets_no_codes_and_old_ones_are_replaced(codec, capsys, tmp_path):
    most = max(SAMPLES) / 24000  # which one reference is longer than
    lengths = {1: 4 * max(SAMPLES), 3: 900}
    samples = [
        (
            f"s-{n}",
            {"text": f"word {n}", "speech": "0.wav", "voice": {"speech": "1.wav"}},
            {"0.wav": wave(SAMPLES[n], n), "1.wav": wave(length, 7), CODES: b"old", VOICE_CODES: b"old"},
        )
        for n, length in lengths.items()
    ]
    write_shards(tmp_path / "speech", "train", samples, 1)
    index_shards(tmp_path / "speech")
    write_codes(tmp_path / "speech", str(codec), workers=1, max_seconds=most)
    assert capsys.readouterr().out.splitlines()[-1].endswith("without codes: voice_audio_too_long 1")
    found = files_of(tmp_path / "speech_codes", "train")
    assert b"old" not in {data for parts in found.values() for data in parts.values()}
    assert [text for text, parts in found.items() if VOICE_CODES in parts] == ["word 3"]


@pytest.mark.parametrize("of", [CODES, VOICE_CODES])
def test_codes_that_do_not_fit_are_refused_by_their_file(of):
    def npy(codes: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, codes)
        return buffer.getvalue()

    name = "voice_codes" if of == VOICE_CODES else "codes"
    for data, reason in (
        (None, "no_codes"),
        (b"old", "codes_unreadable"),
        (npy(np.zeros((3, 5), np.uint16)), "codes_mismatch"),
        (npy(np.full((4, 5), 11, np.uint16)), "codes_mismatch"),
        (npy(np.full((4, 5), -1, np.int16)), "codes_mismatch"),
    ):
        with pytest.raises(SampleError) as refused:
            read_codes({} if data is None else {of: data}, 4, 11, of, name)
        assert refused.value.reason == reason.replace("codes", name)
    read = read_codes({of: npy(np.full((4, 5), 10, np.uint16))}, 4, 11, of, name)
    assert (read.dtype, read.shape, read.min(), read.max()) == (np.int64, (4, 5), 10, 10)


def data(folder: Path, codec: str) -> DataConfig:
    return DataConfig(
        name="coded",
        path="unused",
        sources=[SourceConfig(str(folder))],
        tokenizer=str(folder / "tokenizer"),
        rows="crops",
        row_tokens=12,
        crop_seconds=4 * FRAME / 24000,
        alignment=1,
        streams=1,
        workers=0,
        codec=codec,
    )


def test_code2wav_reads_the_codes_beside_their_waveforms(coded, codec):
    opened = open_codec(str(codec))
    agree = []
    for row in itertools.islice(build_loader(data(coded, opened.content_hash), MODEL, seed=3), 9):
        assert (row.waveform.shape, row.codes.shape) == ((3, 4 * FRAME), (3, 4, 4))
        begins = opened.codec.encode(row.waveform)[:, :, :1] == row.codes[:, :, :1]
        agree.append(begins.float().mean())  # a causal encoder hears in a crop's first frame what follows silence
    assert np.mean(agree) > 0.2


def test_codes_of_another_codec_are_refused_in_one_line(coded, speech, tmp_path):
    other = codec_hash(str(checkpoint(tmp_path / "other", 2)))
    for folder, message in ((coded, "are of another codec"), (speech, "has no codes")):
        with pytest.raises(UserError, match=message) as refused:
            build_loader(data(folder, other), MODEL, seed=3)
        assert "\n" not in str(refused.value)


def test_folders_and_checkpoints_that_cannot_work_are_refused(speech, codec, coded, tmp_path):
    other = checkpoint(tmp_path / "other", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    for words, message in (
        ((speech, str(other), coded), "coded there with another codec"),
        ((speech, str(codec), tmp_path / "mine"), "not empty"),
        ((speech, str(codec), speech), "is data itself"),
        ((tmp_path, str(codec), None), "no shards"),
        ((speech, str(tmp_path), None), "no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            write_codes(*words)
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="workers=-1"):
        extract(speech, str(codec), open_codec, tmp_path / "out", workers=-1)
