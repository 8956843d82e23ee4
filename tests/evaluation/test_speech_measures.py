"""Measures of speech, on signals whose right value is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import soxr
import torch

from omni_train.data_pipelines.rehearsal.speech import Voice, say
from omni_train.errors import UserError
from omni_train.evaluation import speech_measures
from omni_train.evaluation.speech_measures import clipping, dnsmos, pauses, silence, snr_db, speaker_similarity

RATE = 16000
MAN, WOMAN = Voice("", 45, 170), Voice("+f4", 65, 170)


@pytest.fixture(scope="module")
def spoken() -> dict[str, np.ndarray]:
    """Two sentences of a man, and the second of them by a woman."""
    first = "The quick brown fox jumps over the lazy dog and sleeps."
    second = "Nobody knows where the river ends, but everyone follows it home."
    return {"first": say(first, "en", MAN), "second": say(second, "en", MAN), "woman": say(second, "en", WOMAN)}


def noisy(waveform: np.ndarray, ratio_db: float) -> np.ndarray:
    noise = np.random.default_rng(7).standard_normal(len(waveform)).astype(np.float32)
    return waveform + noise * np.sqrt(np.mean(waveform**2) / 10 ** (ratio_db / 10))


@pytest.mark.parametrize("ratio_db", [0.0, 7.0, 15.0, 30.0])
def test_the_signal_to_noise_ratio_of_made_noise_is_found(spoken, ratio_db):
    generator = np.random.default_rng(5)
    amplitudes = generator.gamma(0.4, size=200_003) * generator.choice([-0.01, 0.01], 200_003)
    assert snr_db(noisy(amplitudes.astype(np.float32), ratio_db), RATE) == pytest.approx(ratio_db, abs=1.0)
    assert snr_db(noisy(spoken["first"], ratio_db), RATE) == pytest.approx(ratio_db, abs=2.5)
    padded = np.pad(noisy(spoken["first"], ratio_db), RATE)  # digital silence around it is no recording without noise
    assert snr_db(padded, RATE) == pytest.approx(ratio_db, abs=2.5)


def test_quality_falls_with_noise(spoken):
    clean, spoiled = dnsmos(spoken["first"], RATE), dnsmos(noisy(spoken["first"], 0.0), RATE)
    assert clean.bak > spoiled.bak + 1.5 and clean.ovrl > spoiled.ovrl + 0.5
    assert 1 <= min(*clean, *spoiled) <= max(*clean, *spoiled) <= 5


def test_clipped_samples_are_counted():
    wave = np.sin(np.arange(48000) * 0.0137).astype(np.float32)
    assert clipping(np.clip(2 * wave, -1, 1)) == pytest.approx(2 / 3, abs=0.01)  # |sin| is above a half for that long
    assert clipping(0.99 * wave) == clipping(wave[:0]) == 0


def test_silent_frames_are_counted():
    hum = 0.01 * np.sin(np.arange(24000) * 0.1).astype(np.float32)  # -43 dB
    wave = np.concatenate([hum[:9600], 0.1 * hum[:12000], np.zeros(2400, np.float32)])
    assert silence(wave, 24000) == pytest.approx(14400 / 24000)
    assert silence(wave, 24000, level_db=-40.0) == 1.0
    assert silence(hum[:100], 24000) is None


def test_pauses_are_those_between_words(spoken):
    gap = np.zeros(round(1.3 * RATE), np.float32)
    found = pauses(np.concatenate([gap, spoken["first"], gap, spoken["woman"], gap[:9000], spoken["first"], gap]), RATE)
    assert found.number == 2
    assert found.longest == pytest.approx(1.3, abs=0.15)
    assert pauses(spoken["first"], RATE) == (0, 0.0)
    assert pauses(gap, RATE) is None


def test_opening_a_model_leaves_the_process_its_threads(monkeypatch):
    speech_measures._voice_activity.cache_clear()
    for name in [name for name in sys.modules if name.startswith("silero_vad")]:
        monkeypatch.delitem(sys.modules, name)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pauses(np.zeros(RATE, np.float32), RATE)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_a_voice_is_more_like_itself_than_like_another(spoken):
    same, other = (speaker_similarity(spoken["first"], spoken[name], RATE) for name in ("second", "woman"))
    assert same > other + 0.15
    assert speaker_similarity(spoken["woman"], 0.5 * spoken["woman"], RATE) == pytest.approx(1, abs=0.02)


def test_other_sampling_rates_measure_the_same(spoken):
    faster = [soxr.resample(spoken[name], RATE, 44100) for name in ("first", "second")]
    expected = speaker_similarity(spoken["first"], spoken["second"], RATE)
    assert speaker_similarity(*faster, 44100) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    "waveform", [np.zeros(0, np.float32), np.full(700, 0.1, np.float32), np.zeros(9000, np.float32)]
)
def test_what_is_silent_or_too_short_has_no_value(waveform):
    assert snr_db(waveform, RATE) is None
    assert dnsmos(waveform, RATE) is None
    assert speaker_similarity(waveform, waveform, RATE) is None


@pytest.mark.parametrize(
    ("measure", "package"), [("dnsmos", "speechmos"), ("pauses", "silero_vad"), ("speaker_similarity", "resemblyzer")]
)
def test_a_missing_package_is_named_in_one_line(measure, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{measure} needs the package {package.replace('_', '-')}; install"
    ) as refused:
        speech_measures.require_packages([measure])
    assert "\n" not in str(refused.value)
