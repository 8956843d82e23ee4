"""Crops of speech: pieces of what was said, drawn anew in every epoch, and the same ones after a resume."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.data.rows.crops import read_crop
from omni_train.data.rows.utterances import held_out_utterances
from omni_train.data.samples.media import audio, read_audio
from omni_train.data.samples.parsing import parse_sample
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.data.stream.states import redistribute
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.errors import UserError
from omni_train.recipe.schema import (
    Code2WavConfig,
    CodecConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SourceConfig,
)
from tests.data.media.test_audio import encoded, noise
from tests.data.test_loader import take, through_a_file
from tests.support.ffmpeg import ffmpeg
from tests.support.media import sound_file

SEED = 43
FRAME = 120  # samples: 5 ms
CROP = 7  # frames
BASE = 100_000  # a sample's number is written into every value of its waveform
MODEL = ModelConfig(
    name="speaks",
    codec=CodecConfig(num_quantizers=3),
    code2wav=Code2WavConfig(num_quantizers=3, codebook_size=600, upsampling_ratios=[2, 4], upsample_rates=[5, 3]),
)


def spoken(n: int, samples: int) -> np.ndarray:
    return (n * BASE + 1 + np.arange(samples)).astype(np.float32)


def codes_file(samples: int) -> bytes:
    """Codes that number the frames."""
    frames = np.arange(-(-samples // FRAME), dtype=np.uint16)
    buffer = io.BytesIO()
    np.save(buffer, np.stack([frames, frames + 1, frames + 2]))
    return buffer.getvalue()


def sample(n: int, samples: int) -> tuple[str, dict, dict]:
    files = {"0.wav": sound_file(spoken(n, samples)[:, None], 24000, "WAV", "FLOAT"), "codes.npy": codes_file(samples)}
    if n % 2:
        return f"s-{n:04d}", {"text": f"mo {n}", "speech": "0.wav"}, files
    heard = [{"type": "audio", "audio": "0.wav"}]
    messages = [{"role": "user", "content": heard}, {"role": "assistant", "content": f"ka {n}"}]
    return f"s-{n:04d}", {"messages": messages, "meta": {"task": "transcribe", "language": "en"}}, files


LENGTHS = [300 + 97 * n % 3000 for n in range(31)]  # some shorter than a crop of 840


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    samples = [sample(n, length) for n, length in enumerate(LENGTHS)]
    silent = ("s-9999", {"text": "nobody says this"})
    write_shards(folder, "train", [*samples[:23], silent], 2)
    write_shards(folder, "val", samples[23:], 1)
    index_shards(folder)
    return folder


@pytest.fixture
def data(folder: Path, tokenizer_folder: Path) -> DataConfig:
    return DataConfig(
        name="crops",
        path="unused",
        sources=[SourceConfig(str(folder))],
        tokenizer=str(tokenizer_folder),
        rows="crops",
        row_tokens=3 * CROP + 2,
        crop_seconds=CROP * FRAME / 24000,
        alignment=1,
        streams=2,
        workers=0,
        shuffle_buffer=5,
        packing_buffer=6,
        max_skip_fraction=0.5,
    )


def crops(rows: list[WaveRow]) -> list[tuple[int, int, int]]:
    """(sample, first position, length) of every crop, read from its values."""
    found = []
    for row in rows:
        for waveform, length in zip(row.waveform.double().tolist(), row.lengths.tolist(), strict=True):
            number, start = divmod(int(waveform[0]) - 1, BASE)
            assert waveform[:length] == [number * BASE + 1 + start + i for i in range(length)]
            assert not any(waveform[length:])
            found.append((number, start, length))
    return found


def assert_same(rows: list[WaveRow], others: list[WaveRow]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        for name in ("waveform", "lengths", "draws"):
            assert torch.equal(getattr(row, name), getattr(other, name)), name
        assert (row.samples, row.skipped) == (other.samples, other.skipped)


def test_a_crop_is_a_piece_of_what_was_said_and_zeros_after_its_end(data):
    rows = take(build_loader(data, MODEL, seed=SEED), 40)
    assert all(row.waveform.shape == (3, CROP * FRAME) for row in rows)  # two frames of the row stay free
    for number, start, length in crops(rows):
        assert length == min(LENGTHS[number], CROP * FRAME)
        assert start + length <= LENGTHS[number]
    assert sum((collections.Counter(row.skipped) for row in rows), collections.Counter())["no_speech"] > 0


def test_each_epoch_crops_a_sample_elsewhere(data):
    starts = collections.defaultdict(set)
    for number, start, _ in crops(take(build_loader(data, MODEL, seed=SEED), 60)):
        starts[number].add(start)
    long = [number for number in starts if LENGTHS[number] > 2 * CROP * FRAME]
    assert long and all(len(starts[number]) > 4 for number in long)  # of about eight epochs


def test_what_is_drawn_for_a_crop_is_its_own(data):
    rows = take(build_loader(data, MODEL, seed=SEED), 60)
    draws = torch.cat([row.draws for row in rows]).tolist()
    assert len(set(draws)) == len(draws) and min(draws) >= 0


RECORDINGS = [("wav", 24000), ("flac", 44100), ("wav", 22050), ("mp3", 44100), ("m4a", 48000), ("ogg", 16000)]
RECORDINGS += [("aac", 44100), ("opus", 48000)]


@pytest.mark.parametrize(("kind", "rate"), RECORDINGS)
def test_a_crop_of_a_long_recording_is_that_of_the_whole_and_decodes_no_more(data, monkeypatch, kind, rate):
    file = encoded(kind, noise(30.0, rate), rate)
    content = [{"type": "audio", "audio": f"0.{kind}", "start": 2.5, "end": 26.0}]
    chat = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "ka"}]}
    data = dataclasses.replace(data, crop_seconds=1.5)
    whole = read_audio(file, data.media, 2.5, 26.0, 24000)
    decoded, waveform_of = [], audio.waveform_of

    def counted(blocks, media, sampling_rate, most):
        blocks = list(blocks)
        decoded.append(sum(len(block) for _, block in blocks) / rate)
        return waveform_of(iter(blocks), media, sampling_rate, most)

    monkeypatch.setattr(audio, "waveform_of", counted)
    for draw in range(5):
        crop = read_crop(parse_sample(json.dumps(chat).encode()), {f"0.{kind}": file}, data, MODEL, draw)
        assert crop.length == len(crop.waveform) == 36000
        first = int(np.random.default_rng(draw).integers(len(whole) - 36000 + 1))
        near = whole[first : first + 36000]
        if kind in ("wav", "flac"):
            np.testing.assert_allclose(crop.waveform, near, atol=1e-5)
        else:  # what a lossy decoder makes depends a little on where it begins
            assert np.corrcoef(crop.waveform, near)[0, 1] > 0.999
    assert len(decoded) == 5 and max(decoded) < 1.5 + 0.3


def test_crops_of_a_file_that_does_not_say_its_length_are_drawn_from_all_of_it(data, monkeypatch, tmp_path):
    samples = np.concatenate([np.zeros((160000, 1), np.float32), noise(10.0, 16000, 1)])  # its first bit rate misleads
    (tmp_path / "in.wav").write_bytes(sound_file(samples, 16000, "WAV"))
    file = ffmpeg("-i", tmp_path / "in.wav", "-q:a", 5, "-write_xing", 0, "-f", "mp3", "-")
    text, data = json.dumps({"text": "ka", "speech": "0.mp3"}), dataclasses.replace(data, crop_seconds=1.5)
    asked = []
    monkeypatch.setattr("omni_train.data.rows.crops._drawn", lambda draw, last: asked.append(last) or draw * last)
    for draw in (0, 1):  # the first and the last of all places
        crop = read_crop(parse_sample(text.encode()), {"0.mp3": file}, data, MODEL, draw)
        assert crop.length == 36000
    whole = read_audio(file, data.media, sampling_rate=24000)
    assert abs(len(whole) / 24000 - 20) < 0.2 and abs(asked[1] + 36000 - len(whole)) <= 24


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 9, 34, 51])
def test_a_restored_loader_goes_on_with_the_same_crops(data, workers, taken):
    data.workers = workers
    loader = build_loader(data, MODEL, seed=SEED)
    take(loader, taken)
    state = through_a_file(loader.state_dict())
    expected = take(loader, 40)
    restored = build_loader(data, MODEL, seed=SEED)
    restored.load_state_dict(state)
    assert_same(take(restored, 40), expected)


def test_crops_do_not_depend_on_the_number_of_data_ranks(data):
    expected = take(build_loader(data, MODEL, seed=SEED), 24)
    halves = [build_loader(data, MODEL, seed=SEED, data_rank=rank, data_world_size=2) for rank in range(2)]
    rows = [row for pair in zip(*(take(half, 6) for half in halves), strict=True) for row in pair]
    (state,) = redistribute([through_a_file(half.state_dict()) for half in halves], 1)
    whole = build_loader(data, MODEL, seed=SEED)
    whole.load_state_dict(state)
    assert_same(rows + take(whole, 12), expected)


def test_held_out_crops_are_the_same_at_every_call(data):
    assert_same(evaluation_rows(data, MODEL, rows=2), evaluation_rows(data, MODEL, rows=2))


def record(folder: Path, codec: str, **shards: str) -> None:
    (folder / "codec.json").write_text(json.dumps({"codec": codec, "shards": shards}))


def test_codes_come_with_the_frames_that_they_were_made_of(data, folder):
    record(folder, "a" * 64, **{"train-00000.tar": "a" * 64})
    rows = take(build_loader(dataclasses.replace(data, codec="a" * 64), MODEL, seed=SEED), 30)
    codes = itertools.chain.from_iterable(row.codes.tolist() for row in rows)
    moved = 0
    for (_, start, length), (first, second, third) in zip(crops(rows), codes, strict=True):
        frames = -(-length // FRAME)
        assert first == [start // FRAME + i for i in range(frames)] + [0] * (CROP - frames)
        assert start % FRAME == 0
        assert second[:frames] == [code + 1 for code in first[:frames]]
        assert third[:frames] == [code + 2 for code in first[:frames]]
        moved += start > 0
    assert moved > 20


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "has no codes; make them with"),
        (("b" * 64, {}), "are of another codec, bbbbbbbbbbbb…"),
        (("a" * 64, {"train-00001.tar": "c" * 64}), "train-00001.tar are of another codec, cccccccccccc…"),
    ],
)
def test_codes_of_another_codec_are_refused_in_one_line(data, folder, records, message):
    (folder / "codec.json").unlink(missing_ok=True)
    if records:
        record(folder, records[0], **records[1])
    with pytest.raises(UserError) as refused:
        build_loader(dataclasses.replace(data, codec="a" * 64), MODEL, seed=SEED)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_codes_that_do_not_fit_their_speech_cost_their_sample(data, folder):
    record(folder, "a" * 64)
    narrow = dataclasses.replace(MODEL, code2wav=dataclasses.replace(MODEL.code2wav, codebook_size=9))
    rows = take(build_loader(dataclasses.replace(data, codec="a" * 64), narrow, seed=SEED), 12)
    assert {number for number, _, _ in crops(rows)} == {n for n in range(23) if -(-LENGTHS[n] // FRAME) + 2 <= 9}
    assert sum(row.skipped.get("codes_mismatch", 0) for row in rows) > 0


def test_held_out_utterances_are_whole_up_to_their_bound_and_shared_among_ranks(data):
    evaluation = EvaluationConfig(samples=100, utterance_seconds=0.1)  # 2,400 samples
    utterances = held_out_utterances(data, MODEL, evaluation)
    assert [len(utterance.waveform) for utterance in utterances] == [min(LENGTHS[n], 2400) for n in range(23, 31)]
    for n, utterance in enumerate(utterances, 23):
        whole = LENGTHS[n] <= 2400
        assert utterance.text == ((f"mo {n}" if n % 2 else f"ka {n}") if whole else None)
        np.testing.assert_array_equal(utterance.waveform, spoken(n, LENGTHS[n])[:2400])
    shares = [held_out_utterances(data, MODEL, evaluation, data_rank=rank, data_world_size=3) for rank in range(3)]
    assert sorted(each.name for share in shares for each in share) == sorted(each.name for each in utterances)


def test_utterances_need_speech(data, tmp_path, folder):
    write_shards(tmp_path, "val", [("s-1", {"text": "nobody says this"})], 1)
    index_shards(tmp_path)
    with pytest.raises(UserError, match="no speech"):
        held_out_utterances(dataclasses.replace(data, sources=[SourceConfig(str(tmp_path))]), MODEL, EvaluationConfig())
