"""``omni-train generate`` speaks what it is given and what it writes, and refuses what does not fit in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.codec import voice
from tests.support.media import image_file, sound_file, tone
from tests.support.speaking import TEXT, run_generate, write_runs


@pytest.fixture(scope="module")
def world(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    distributed(1, write_runs, folder)
    return folder


@pytest.fixture
def generate(distributed):
    """``generate(word, …)`` -> exit code, standard output, standard error."""
    return lambda *words: distributed(1, run_generate, *map(str, words))[0]


@pytest.mark.parametrize("style", ["interleaved", "dual_track"])
def test_a_text_is_spoken(world, generate, tmp_path, style):
    voice = ["voice=anna"] if style == "dual_track" else ["description=low and slow"]
    words = [f"checkpoint={world / style}", f"text={TEXT}", *voice, "max_seconds=0.5"]
    code, out, err = generate(*words, f"speech={tmp_path / 'out.wav'}")
    assert (code, out) == (0, f"{TEXT}\n"), err
    sound, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == 24000 and len(sound) > 240 and sound.std() > 0.001
    assert f"{len(sound) / rate:.2f} s of speech in " in err and "ended by " in err and "real-time factor" in err


def spoken(world, generate, folder, style, *words):
    """What a command writes, and how it sounds."""
    file = folder / "out.wav"
    code, out, err = generate(f"checkpoint={world / style}", *words, f"speech={file}", "max_seconds=0.3")
    assert code == 0, err
    return out, soundfile.read(file)[0]


@pytest.fixture
def media(tmp_path):
    (tmp_path / "a.wav").write_bytes(sound_file(tone(0.7), format="WAV"))
    (tmp_path / "b.png").write_bytes(image_file(np.random.default_rng(1).integers(0, 255, (40, 56, 3), np.uint8)))
    return tmp_path


@pytest.mark.parametrize("style", ["interleaved", "dual_track"])
def test_an_answer_to_messages_with_media_is_written_and_spoken(world, generate, media, style):
    """The same as the answer to a prompt with the same media."""
    shown = [{"type": "audio", "audio": "a.wav"}, {"type": "image", "image": "b.png"}]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": "kalan?"}]}]
    (media / "chat.json").write_text(json.dumps({"messages": messages}))
    words = ["max_new_tokens=9", *(["voice=ben"] if style == "dual_track" else [])]
    out, sound = spoken(world, generate, media, style, f"messages={media / 'chat.json'}", *words)
    assert len(out) > 2 and len(sound)
    files = f"media={media / 'a.wav'},{media / 'b.png'}"
    asked, same = spoken(world, generate, media, style, "prompt=kalan?", files, *words)
    assert asked == out and np.array_equal(same, sound)


def told(rank, world_size, folder, style, file):
    """Log-probabilities of the frames of one text, spoken in answer to a sound."""
    from omni_train import platform
    from omni_train.checkpoint.store import resolve
    from omni_train.data.samples.tokenizer import Tokenizer
    from omni_train.frozen.thinker import open_whole_thinker
    from omni_train.generation.answering import speaker_of, written
    from omni_train.generation.asked import read_prompt
    from omni_train.generation.opening import open_recipe, open_talker
    from omni_train.rollout.sampling import Sampling
    from omni_train.rollout.speech import GREEDY, SpeechLimits

    checkpoint = resolve(folder / style)
    recipe = open_recipe(checkpoint, None, None)
    platform.parallel.initialize(recipe.parallel, 1)
    thinker, talker = open_whole_thinker(str(folder / "thinker"), recipe), open_talker(checkpoint, recipe)
    asked, tokenizer = read_prompt("kalan?", [str(file)], recipe.data), Tokenizer(recipe.data.tokenizer)
    answer = written(thinker, *asked, recipe, tokenizer, sampling=Sampling(), seed=0, max_new_tokens=1)
    list(answer.pieces)
    who = {"speaker": 20, "description": None}
    speaker = speaker_of(answer, talker, recipe, tokenizer, who, GREEDY, SpeechLimits())([7, 8, 9, 10])
    speaker.feed(0, [], ended=True)
    for _ in range(8):
        speaker.step()
    platform.parallel.destroy()
    return speaker.speech[0].log_probs


@pytest.mark.parametrize("style", ["interleaved", "dual_track"])
def test_the_speech_of_a_text_hears_what_was_asked(world, distributed, media, style):
    (first,), (again,) = (distributed(1, told, world, style, media / "a.wav") for _ in range(2))
    (media / "a.wav").write_bytes(sound_file(tone(0.7, hertz=900), format="WAV"))
    (other,) = distributed(1, told, world, style, media / "a.wav")
    assert len(first) > 2 and first == again
    assert abs(first[0] - other[0]) > 1e-3


def test_another_utterance_is_a_voice(world, generate, media):
    wave = np.concatenate([loud * voice(12000, seed).numpy() for seed, loud in ((3, 1.0), (8, 0.05), (11, 0.4))])
    (media / "voice.wav").write_bytes(sound_file(wave[:, None], 24000, format="WAV"))
    words = [world, generate, media, "interleaved", f"text={TEXT}", "greedy=true"]
    _, without = spoken(*words)
    _, heard = spoken(*words, f"voice={media / 'voice.wav'}")
    _, described = spoken(*words, "description=low")
    assert len({sound.tobytes() for sound in (without, heard, described)}) == 3


def test_a_thinker_alone_writes_text(world, generate):
    code, out, err = generate(f"checkpoint={world / 'thinker'}", "prompt=kalan", "max_new_tokens=5", "greedy=true")
    assert code == 0 and out.endswith("\n") and err == "the text was cut at max_new_tokens=5\n"
    assert generate(f"checkpoint={world / 'dual_track'}", "prompt=kalan", "max_new_tokens=5", "greedy=true")[1] == out


SPEAKS = "speech={out}"
DUAL, INTERLEAVED = ("checkpoint={world}/dual_track", SPEAKS), ("checkpoint={world}/interleaved", SPEAKS)
REFUSED = [
    ([*DUAL], "nothing is asked: give one of messages=, prompt= and text="),
    ([*DUAL, "text=a", "prompt=b"], "prompt and text: give one of messages=, prompt= and text="),
    ([*DUAL, "text= ", "voice=anna"], "text= is empty; say something"),
    ([*DUAL, "text=a"], "voice= is missing; choose one of anna, ben"),
    ([*DUAL, "text=a", "voice=carl"], "voice=carl: the Talker has no such voice; choose one of anna, ben"),
    (
        [*DUAL, "text=a", "description=low"],
        "description=low: the Talker speaks in voices with names; give voice=anna, ben",
    ),
    (
        [*DUAL, "text=a", "thinker=x"],
        "thinker=x: means something with messages= or prompt=; a text that is there is not written",
    ),
    ([DUAL[0], "text=a"], "text=a: means something with speech="),
    ([DUAL[0], "prompt=a", "voice=anna"], "voice=anna: means something with speech="),
    ([*DUAL, "messages=a.json", "media=a.wav"], "media=a.wav: means something with prompt="),
    (
        [*DUAL, "prompt=a", "media=a.txt", "voice=anna"],
        "media=a.txt: cannot be read: No such file or directory",
    ),
    ([*DUAL, "prompt=a", "media={text}", "voice=anna"], "media={text}: is no sound, image or video that can be read"),
    (
        [*DUAL, "text=a", "voice=anna", "greedy=true", "speech_temperature=0"],
        "greedy=true: takes the likeliest, whatever the temperature; leave one of them out",
    ),
    ([*DUAL, "text=a", "voice=anna", "repetition_penalty=0"], "repetition_penalty=0.0: must be above 0"),
    (
        [*DUAL, "text=a", "voice=anna", "frames_per_token=3"],
        "frames_per_token=3.0: the Talker needs no ratio; leave it out",
    ),
    ([DUAL[0], "speech={out}.mp3", "text=a"], "speech={out}.mp3: must be a file .wav in a folder that is there"),
    (
        ["checkpoint={world}/codec", "text=a", SPEAKS],
        "checkpoint={world}/codec/{step}: no recipe.yaml of a run above it; give recipe= one, such as what "
        "`omni-train train … --cfg job` prints",
    ),
    (
        ["checkpoint={world}/thinker", "text=a", SPEAKS],
        "speech={out}: checkpoint={world}/thinker/{step} is a Thinker's, which does not speak; leave it out",
    ),
    (
        [*DUAL, "text=a", "voice=anna", "codec={world}/thinker"],
        "codec={world}/thinker: no codec in this checkpoint; give one of network=codec",
    ),
    (
        [*DUAL, "text=a", "voice=anna", "codec={world}/wider"],
        "codec={world}/wider: 6 codebooks of 11, the Talker's are 5 of 11; give the codec whose codes it was trained "
        "on",
    ),
    (
        [*DUAL, "prompt=a", "voice=anna", "thinker={world}/stranger"],
        "thinker={world}/stranger/{step}: its table of text is not the one that the Talker reads; give the Thinker "
        "that it was trained above",
    ),
    ([*INTERLEAVED, "text=a", "voice=anna"], "voice=anna: cannot be read: No such file or directory"),
    (
        [*INTERLEAVED, "text=a", "voice={empty}"],
        "voice={empty}: refused as audio_empty; give a few seconds of somebody who speaks",
    ),
    (
        [*INTERLEAVED, "text=a", "voice={silence}"],
        "voice={silence}: nothing is heard in it, or only noise; give a few seconds of somebody who speaks",
    ),
    (
        [*INTERLEAVED, "text=a", "voice={dull}"],
        "voice={dull}: nothing is heard in it, or only noise; give a few seconds of somebody who speaks",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_refused_in_one_line(world, generate, tmp_path, words, message):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "silence.wav").write_bytes(sound_file(np.zeros((24000, 1)), 24000, format="WAV"))
    (tmp_path / "dull.wav").write_bytes(sound_file(np.full((24000, 1), 0.002), 24000, format="WAV"))
    names = {"world": world, "out": tmp_path / "out.wav", "step": "checkpoints/step_00000001"}
    (tmp_path / "text.wav").write_text("It only says so.")
    names |= {name: tmp_path / f"{name}.wav" for name in ("empty", "silence", "dull", "text")}
    code, out, err = generate(*(word.format(**names) for word in words))
    assert (code, out, err) == (2, "", f"error: {message.format(**names)}\n")


def test_another_codec_than_that_of_the_codes_is_refused(world, generate, tmp_path):
    words = [f"checkpoint={world / 'dual_track'}", "text=a", "voice=anna", f"codec={world / 'other'}"]
    code, _, err = generate(*words, f"speech={tmp_path / 'out.wav'}")
    assert code == 2 and err.startswith(f"error: codec={world / 'other'}: is ") and "(data.codec); give that one" in err


def test_one_process_needs_no_launcher(world, tmp_path):
    words = [f"checkpoint={world / 'dual_track'}", "text=kalan", "voice=anna", f"speech={tmp_path / 'out.wav'}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "omni_train", "generate", *words, "max_seconds=0.05", "greedy=true"],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "kalan\n"), done.stderr
    assert (tmp_path / "out.wav").stat().st_size > 1000
