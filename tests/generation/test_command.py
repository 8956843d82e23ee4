"""``omni-train generate`` speaks what it is given and what it writes, and refuses what does not fit in one line."""

from __future__ import annotations

import pytest
import soundfile

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
