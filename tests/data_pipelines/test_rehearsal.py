from __future__ import annotations

import filecmp
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from omni_train.data.samples.parsing import parse_sample
from omni_train.data.samples.sample import Chat, Document
from omni_train.data.samples.tokenizer import CONTROL_TOKENS, Tokenizer
from omni_train.data_pipelines import rehearsal
from omni_train.data_pipelines.rehearsal import listening, phrases, seeing, speaking, tokenizer, watching
from omni_train.data_pipelines.rehearsal.kinds import KINDS, SPOKEN
from omni_train.data_pipelines.rehearsal.pictures import COLORS
from omni_train.data_pipelines.rehearsal.speech import RATE
from omni_train.data_pipelines.rehearsal.world import World
from omni_train.errors import UserError

SHARE = 0.04  # of the media


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsal") / "set"
    assert rehearsal.build(out, samples=SHARE)
    return out


def read(folder: Path, split: str) -> dict[str, tuple[dict, dict[str, bytes]]]:
    """Fields and media of every sample of a split."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                assert name not in found.setdefault(key, {})
                found[key][name] = tar.extractfile(member).read()
    return {key: (json.loads(files.pop("json")), files) for key, files in found.items()}


def both(folder: Path) -> list[tuple[dict, dict[str, bytes]]]:
    return [*read(folder, "train").values(), *read(folder, "val").values()]


def parts(fields: dict) -> list[dict]:
    return [part for message in fields["messages"] if message["role"] == "user" for part in message["content"]]


def wave_of(data: bytes) -> np.ndarray:
    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert (rate, wave.ndim) == (RATE, 1)
    return wave


def frames_of(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Times in seconds (t,) and frames (t, height, width, 3) of a video."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    return np.array([frame.time for frame in frames]), np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def track_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.audio[0].codec_context.sample_rate == RATE
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def nearest_color(pixels: np.ndarray) -> str:
    """The color most pixels (..., 3) are of, among those near to one."""
    distance = np.abs(pixels.reshape(-1, 1, 3).astype(int) - np.array(list(COLORS.values()))).sum(-1)
    return list(COLORS)[np.bincount(distance.argmin(1)[distance.min(1) < 75], minlength=len(COLORS)).argmax()]


def test_every_sample_is_of_the_schema_under_a_key_of_its_own(built):
    for kind in ("text", "chat", *KINDS, *SPOKEN):
        train, held_out = read(built / kind, "train"), read(built / kind, "val")
        assert len(held_out) >= 2
        assert 5 * len(held_out) < len(train) < 9 * len(held_out)
        assert not set(train) & set(held_out)
        for key, (fields, media) in (train | held_out).items():
            assert key.isascii()
            sample = parse_sample(json.dumps(fields).encode())
            assert isinstance(sample, Document if kind == "text" or (kind in SPOKEN and "text" in fields) else Chat)
            assert {"language", "task", "source"} <= set(sample.meta), key
            if kind in KINDS:
                assert [medium.file for medium in sample.media] == list(media)
                assert sample.turns[-1].text == sample.meta["answer"]


def test_the_tokenizer_has_exactly_the_ids_asked_for_and_writes_all_languages(built):
    ours = Tokenizer(built / "tokenizer")
    assert ours.size == 4096
    assert [ours.token_id(name) for name in CONTROL_TOKENS] == list(range(4096 - len(CONTROL_TOKENS), 4096))
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(built / "tokenizer")
    assert (len(theirs), theirs.eos_token) == (4096, "<|im_end|>")
    for fields, _ in list(read(built / "text", "val").values())[:40]:
        assert ours.decode(ours.encode(fields["text"])) == fields["text"]
        assert theirs(fields["text"])["input_ids"] == ours.encode(fields["text"])
    for language in phrases.LANGUAGES.values():
        texts = (*language.digits, language.write_down, language.say, language.repeat, language.see)
        assert all(ours.decode(ours.encode(text)) == text for text in texts)


def test_the_tokenizer_learns_from_what_was_there_before_there_was_speech(built, tmp_path):
    tokenizer.train(rehearsal._texts(built, ("text", "chat", *KINDS)), tmp_path / "tokenizer", 4096)
    assert filecmp.cmp(built / "tokenizer" / "tokenizer.json", tmp_path / "tokenizer" / "tokenizer.json", shallow=False)


def test_the_chat_template_writes_chatml_and_the_slots_of_media(built):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(built / "tokenizer")
    given = [{"type": "audio"}, {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": given}, {"role": "assistant", "content": "red"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )


def test_every_medium_decodes_to_the_length_that_its_meta_says(built):
    formats = Counter()
    for kind in KINDS:
        for fields, media in both(built / kind):
            for part in parts(fields):
                if part["type"] == "text":
                    continue
                data = media[part[part["type"]]]
                if part["type"] == "image":
                    with Image.open(io.BytesIO(data)) as image:
                        assert image.convert("RGB").getextrema() != ((0, 0),) * 3
                        assert all(60 <= side <= 108 for side in image.size)
                        formats[image.format] += 1
                    continue
                seconds = fields["meta"].get("duration")
                if part["type"] == "audio":
                    wave = wave_of(data)
                    assert np.abs(wave).max() > 0.02
                    formats["FLAC"] += 1
                    assert seconds is None or len(wave) / RATE == seconds
                    assert part.get("end", 0) <= len(wave) / RATE
                    continue
                times, frames = frames_of(data)
                assert all(side % 2 == 0 and 56 <= side < 80 for side in frames.shape[1:3])
                with av.open(io.BytesIO(data)) as container:
                    formats[container.streams.video[0].codec.name, bool(container.streams.audio)] += 1
                    end = len(times) / container.streams.video[0].average_rate
                assert seconds is None or end == pytest.approx(seconds)
                if part["sound"]:
                    assert len(track_of(data)) / RATE == pytest.approx(end, abs=0.1)
    assert set(formats) >= {"FLAC", "JPEG", "PNG", "WEBP"}
    assert set(formats) >= {(codec, sound) for codec in ("h264", "mpeg4") for sound in (True, False)}


def _vocabulary(language: phrases.Language) -> Iterator[str]:
    yield from (*language.digits, *language.commands, *language.directions, language.moves)
    for forms in language.colors:
        yield from forms
    for article, noun, _ in language.shapes:
        yield article + noun


def test_speech_is_in_six_languages_and_every_transcript_in_its_own(built):
    words = {code: " ".join(_vocabulary(language)) for code, language in phrases.LANGUAGES.items()}
    languages = Counter()
    for fields, _ in both(built / "speech"):
        meta = fields["meta"]
        languages[meta["language"]] += 1
        tokens = meta["answer"] if meta["language"] == "zh" else meta["answer"].split(" ")
        assert all(token in words[meta["language"]] + "的" for token in tokens)
        assert parts(fields)[-1]["text"] == phrases.LANGUAGES[meta["language"]].write_down
    assert set(languages) == {"en", "de", "fr", "es", "it", "zh"}


def test_longer_transcripts_take_longer_to_say(built):
    spoken = [fields["meta"] for fields, _ in both(built / "speech") if fields["meta"]["language"] != "zh"]
    lengths, durations = zip(*((len(meta["answer"]), meta["duration"]) for meta in spoken), strict=True)
    assert np.corrcoef(lengths, durations)[0, 1] > 0.8


def test_what_is_held_out_is_not_in_training():
    """Drawn without rendering: sentences, voices, scenes, texts and events."""
    seen = {}
    for split in ("train", "val"):
        world = World("draws", split)
        utterances = {listening.draw_utterance(world) for _ in range(8000)}
        seen[split] = {
            "voice": {listening.draw_voice(world) for _ in range(500)},
            "sentence": {(code, words) for code, words in utterances if len(words.split()) > 5},
            "question": {q.name for q in (listening.draw_question(world) for _ in range(3000)) if "larger" in q.name},
            "scene": {seeing.draw_scene(world, "large") for _ in range(3000)},
            "shape's name": {speaking.draw_sight(world, code)[1] for code in phrases.LANGUAGES for _ in range(60)},
            "event": {watching.draw_event(world, phrases.DIRECTIONS) for _ in range(1000)},
        }
    for what, train in seen["train"].items():
        held_out = seen["val"][what]
        assert held_out and len(held_out) < len(train) / 4, what
        assert not held_out & train, what
    worlds = World("draws", "train"), World("draws", "val")
    train, held_out = ({speaking.draw_text(world, "en", 2) for _ in range(3000)} for world in worlds)
    assert held_out and not held_out & train
    train, held_out = ({speaking.draw_words(world, "en") for _ in range(3000)} for world in worlds)
    assert held_out and not held_out & train


@pytest.mark.parametrize("code", phrases.LANGUAGES)
def test_words_in_any_order_follow_each_other_whatever_they_are(code):
    language, world = phrases.LANGUAGES[code], World("draws", "train")
    units = language.units()
    assert len(set(units)) == len(units) == 10 + 6 + 5 + 4 + 5
    drawn = [speaking.draw_words(world, code) for _ in range(4000)]
    pairs = {(one, other) for one in units for other in units}
    heard = {pair for pair in pairs if any(language.separator.join(pair) in text for text in drawn)}
    assert len(heard) > 0.97 * len(pairs)
    assert not [unit for unit in units if unit.startswith(" ") or "  " in unit]


def test_what_is_spoken_lasts_as_long_as_its_meta_says_in_the_voice_that_it_says(built):
    """Speech and reference are of one voice and other words; a voice is described in half, and in one way."""
    lengths, described, tasks, turns = [], Counter(), Counter(), Counter()
    descriptions: dict[str, set] = {}
    for kind in SPOKEN:
        for fields, media in both(built / kind):
            meta, voice = fields["meta"], fields["voice"]
            given = (
                [part[part["type"]] for part in parts(fields) if part["type"] != "text"] if "messages" in fields else []
            )
            assert [*given, fields["speech"], voice["speech"]] == list(media)
            assert len(wave_of(media[fields["speech"]])) / RATE == meta["duration"]
            text = fields["text"] if "text" in fields else fields["messages"][-1]["content"]
            assert meta["reference"] not in text
            assert 0.2 < len(wave_of(media[voice["speech"]])) / RATE < 4
            assert meta["voice"].split()[0] == f"+{voice['name']}"
            if "description" in voice:
                descriptions.setdefault(voice["description"], set()).add(meta["voice"])
            if kind == "spoken_long":
                assert 30 <= meta["duration"] <= 60
                continue
            lengths.append(meta["duration"])
            described["description" in voice] += 1
            tasks[meta["task"]] += 1
            turns[len(fields.get("messages", ()))] += 1
    assert max(map(len, descriptions.values())) == 1 and len(set.union(*descriptions.values())) == len(descriptions)
    assert 0.35 < described[True] / described.total() < 0.65
    assert set(tasks) == {"read", "say", "repeat", "see"} and set(turns) == {0, 2, 4}
    assert min(lengths) < 1 and np.median(lengths) > 1 and max(lengths) > 5


def test_voices_that_speak_are_of_their_split(built):
    for kind in SPOKEN:
        held_out, train = (
            {fields["meta"]["voice"] for fields, _ in read(built / kind, split).values()} for split in ("val", "train")
        )
        assert held_out and not held_out & train


def test_a_reference_sounds_like_its_speech_and_not_like_other_voices(built):
    """Median fundamental frequencies of the two agree, over voices that differ by more than an octave."""
    pitches = [
        [fundamental(wave_of(media[name])) for name in (fields["speech"], fields["voice"]["speech"])]
        for fields, media in read(built / "spoken", "train").values()
        if fields["meta"]["duration"] > 0.8
    ]
    heard, reference = np.log2(pitches).T
    assert np.ptp(heard) > 1
    assert np.corrcoef(heard, reference)[0, 1] > 0.8


def fundamental(wave: np.ndarray) -> float:
    """Median fundamental frequency of the loud frames of 64 ms, in Hz, by their autocorrelation."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::512]
    loud = frames[np.square(frames).mean(1) > 0.3 * np.square(wave).mean()]
    power = np.abs(np.fft.rfft(loud * np.hanning(1024), 2048)) ** 2
    lags = np.fft.irfft(power)[:, RATE // 400 : RATE // 60]
    return RATE / (float(np.median(lags.argmax(1))) + RATE // 400)


def test_a_set_of_before_there_was_speech_gets_it(built, tmp_path, capsys):
    """The folders are those of a new set, nothing else is touched, and a folder that was there already stays."""
    old = shutil.copytree(built, tmp_path / "old")
    for kind in SPOKEN:
        shutil.rmtree(old / kind)
    before = {file: file.stat().st_mtime_ns for file in old.rglob("*") if file.is_file()}
    assert rehearsal.build(old, samples=SHARE)
    told = capsys.readouterr().out
    assert all(name in told for name in SPOKEN)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    files = sorted(str(file.relative_to(built)) for file in built.rglob("*") if file.is_file())
    assert filecmp.cmpfiles(built, old, files, shallow=False) == (files, [], [])
    assert sorted(path.name for path in old.iterdir()) == sorted(path.name for path in built.iterdir())


def test_spoken_questions_have_their_text_twin_in_the_same_split(built):
    for split in ("train", "val"):
        twins = {}
        for fields, _ in read(built / "chat", split).values():
            if "twin" in fields["meta"]:
                twins[fields["meta"]["twin"]] = fields["messages"]
        for fields, _ in read(built / "audio_questions", split).values():
            question, answer = twins[fields["meta"]["twin"]]
            assert question["content"][0]["text"] == fields["meta"]["transcript"]
            assert answer == fields["messages"][1]


def test_colors_asked_for_are_those_of_the_pixels(built):
    asked = 0
    for kind in ("images", "image_questions"):
        for fields, media in both(built / kind):
            if fields["meta"]["task"] == "color":
                asked += 1
                picture = np.asarray(Image.open(io.BytesIO(*media.values())).convert("RGB"))
                assert nearest_color(picture) == fields["meta"]["answer"]
    assert asked > 5


def test_answers_about_videos_are_what_their_frames_show(built):
    """A change at the time that is told, the direction of a motion, the color at a sound."""
    asked = Counter()
    for fields, media in [*both(built / "video"), *both(built / "video_audio")]:
        meta, question = fields["meta"], parts(fields)[-1]["text"]
        times, frames = frames_of(media["0.mp4"])
        if question in ("When does the color change?", "When does the second shape appear?"):
            change = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3)).argmax() + 1
            assert f"{times[change]:.1f} seconds" == meta["answer"]
            asked["change"] += 1
        elif "direction" in meta:
            y, x = (
                np.argwhere(np.abs(frame.astype(int) - frame[0, 0]).sum(-1) > 90).mean(0) for frame in frames[[0, -1]]
            )
            moved = x - y  # rows down, columns right, from the first frame to the last
            way = ("up", "down") if abs(moved[0]) > abs(moved[1]) else ("left", "right")
            assert way[int(moved[np.abs(moved).argmax()] > 0)] == meta["direction"]
            asked["direction"] += 1
        elif meta["task"] == "color" and parts(fields)[0]["sound"]:
            assert nearest_color(frames[np.searchsorted(times, meta["seconds"] + 0.1)]) == meta["answer"]
            asked["color"] += 1
    assert min(asked[what] for what in ("change", "direction", "color")) > 3


def test_sounds_are_heard_when_the_answer_says(built):
    asked = Counter()
    for fields, media in both(built / "video_audio"):
        if parts(fields)[0]["sound"]:
            start = np.argmax(np.abs(track_of(media["0.mp4"])) > 0.003) / RATE
            assert start == pytest.approx(fields["meta"]["seconds"], abs=0.12)
            asked["video"] += 1
    for fields, media in both(built / "long_audio"):
        if fields["meta"]["task"] == "when":
            wave = wave_of(media["0.flac"])
            tone = wave * np.exp(-2j * np.pi * 1000 * np.arange(len(wave)) / RATE)
            power = np.abs(np.diff(np.cumsum(tone)[:: RATE // 50], n=1))  # of each 20 ms
            heard = np.convolve(power, np.ones(13), "valid").argmax() / 50
            assert heard == pytest.approx(fields["meta"]["seconds"], abs=0.1)
            asked["long_audio"] += 1
    assert min(asked[what] for what in ("video", "long_audio")) > 1


def test_another_build_gives_the_same_bytes(built, tmp_path):
    again = tmp_path / "again"
    program = f"from omni_train.data_pipelines import rehearsal; rehearsal.build({str(again)!r}, samples={SHARE})"
    environment = os.environ | {"PYTHONHASHSEED": "101"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    files = sorted(str(file.relative_to(built)) for file in built.rglob("*") if file.is_file())
    assert set(files) >= {"tokenizer/tokenizer.json", "text/train-00000.tar", "video/val-00000.tar"}
    assert filecmp.cmpfiles(built, again, files, shallow=False) == (files, [], [])


def test_a_complete_set_is_left_as_it_is(built, capsys):
    assert not rehearsal.build(built)
    assert "already holds" in capsys.readouterr().out


def test_something_else_in_the_way_is_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a rehearsal data set"):
        rehearsal.build(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal.kinds, "KINDS", {"smells": ()})  # which the processes that write do not know
    with pytest.raises(RuntimeError, match=r"smells/train-0000\d.tar was not made"):
        rehearsal.build(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [{"vocab_size": 200}, {"samples": 0.0}, {"samples": 2.0}])
def test_what_cannot_be_made_is_refused(tmp_path, arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        rehearsal.build(tmp_path / "set", **arguments)


def test_one_kind_alone_is_that_of_the_whole_set_and_may_be_more(built, tmp_path, capsys):
    out = tmp_path / "folder" / "spoken"
    assert rehearsal.build(out, kind="spoken", samples=2 * SHARE)
    for split in ("train", "val"):
        more, fewer = read(out, split), read(built / "spoken", split)
        assert len(more) > len(fewer) and fewer.items() <= more.items()
    assert (out / ".nv-meta" / "dataset.yaml").is_file() and len([*out.parent.iterdir()]) == 1
    capsys.readouterr()
    assert not rehearsal.build(out, kind="spoken", samples=2 * SHARE)
    assert "already holds the rehearsal's spoken" in capsys.readouterr().out
    for other in ({"kind": "spoken", "samples": 3 * SHARE}, {"kind": "spoken_long", "samples": 2 * SHARE}):
        with pytest.raises(UserError, match=f"exists and is not {other['samples']} of the rehearsal's {other['kind']}"):
            rehearsal.build(out, **other)


def test_a_kind_that_speaks_does_so_in_the_languages_that_are_named(tmp_path, capsys):
    out = tmp_path / "spoken"
    assert rehearsal.build(out, kind="spoken", samples=2 * SHARE, languages="zh,en")
    for split in ("train", "val"):
        assert {fields["meta"]["language"] for fields, _ in read(out, split).values()} == {"en", "zh"}
    assert not rehearsal.build(out, kind="spoken", samples=2 * SHARE, languages="en,zh")
    for other in ("", "en", "en,fr", "en,fr,zh"):
        with pytest.raises(UserError, match="exists and is not"):
            rehearsal.build(out, kind="spoken", samples=2 * SHARE, languages=other)


@pytest.mark.parametrize(
    "arguments", [{"languages": "en"}, {"kind": "images", "languages": "en"}, {"kind": "spoken", "languages": "xx"}]
)
def test_languages_that_are_not_spoken_are_refused(tmp_path, arguments):
    with pytest.raises(
        UserError, match=r"^languages=(en|xx): some of en,de,fr,es,it,zh, of kind=spoken_long or kind=s"
    ):
        rehearsal.build(tmp_path / "set", **arguments)


def test_a_kind_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^kind=text: no such kind with media; choose one of .*, spoken$"):
        rehearsal.build(tmp_path / "set", kind="text")
    with pytest.raises(UserError, match=r"^samples=0 must be above 0$"):
        rehearsal.build(tmp_path / "set", kind="spoken", samples=0)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_that_speaks_the_answer_is_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"omni_train\[rehearsal\]"):
        rehearsal.build(tmp_path / "set")
