"""Waveforms of every kind of file."""

import gc
import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
import soxr

from omni_train.data.samples.media import read_audio
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig
from tests.support.media import aac_file, sound_file, video_file

LOSSLESS = ("flac", "wav", "aiff")


def noise(seconds: float, rate: int, channels: int = 2) -> np.ndarray:
    """Sound below 2 kHz, which every codec keeps well."""
    low = np.random.default_rng(1).standard_normal((round(seconds * 4000), channels)).astype(np.float32)
    return 0.1 * soxr.resample(low, 4000, rate)[: round(seconds * rate)]


def encoded(kind: str, samples: np.ndarray, rate: int) -> bytes:
    if kind in ("m4a", "aac"):
        return aac_file(samples, rate, {"m4a": "ipod", "aac": "adts"}[kind])
    if kind == "mkv":
        return video_file(np.zeros((8, 32, 32, 3), np.uint8), container="matroska", sound=samples, sound_rate=rate)
    return sound_file(samples, rate, "OGG" if kind == "opus" else kind.upper(), "OPUS" if kind == "opus" else None)


@pytest.mark.parametrize("kind", ["flac", "wav", "aiff", "mp3", "ogg", "opus", "m4a", "mkv"])
@pytest.mark.parametrize("rate", [16000, 48000])
def test_every_format_gives_the_mean_of_its_channels_at_16_khz(kind, rate, media):
    samples = noise(1.5, rate)
    expected = soxr.resample(samples.mean(axis=1), rate, 16000)
    found = read_audio(encoded(kind, samples, rate), media)
    assert found.dtype == np.float32 and abs(len(found) - len(expected)) <= (0 if kind in LOSSLESS else 1024)
    inside = slice(2000, 20000)  # lossy codecs take a while to settle
    error = np.abs(found[inside] - expected[inside])
    if kind in LOSSLESS:
        assert error.max() < 1e-4
    else:
        likeness = [np.corrcoef(found[inside], np.roll(expected, shift)[inside])[0, 1] for shift in range(-20, 21)]
        assert np.argmax(likeness) == 20 and likeness[20] > 0.95


@pytest.mark.parametrize("kind", ["flac", "wav", "mp3", "ogg", "opus", "m4a", "mkv"])
def test_a_part_equals_that_part_of_the_whole(kind, media):
    data = encoded(kind, noise(8.0, 16000), 16000)
    whole = read_audio(data, media)
    part = read_audio(data, media, start=5.25, end=6.5)
    assert abs(len(part) - 20000) <= 16
    shift = max(range(-16, 17), key=lambda k: np.dot(part[500:19000], whole[84500 + k : 103000 + k]))
    assert abs(shift) <= (0 if kind not in ("mkv", "opus") else 16)  # Matroska's clock has whole milliseconds
    assert np.abs(part[500:19000] - whole[84500 + shift : 103000 + shift]).max() < 2e-2
    rest = read_audio(data, media, start=5.25)
    assert abs(len(rest) - (len(whole) - 84000)) <= 16
    assert abs(len(read_audio(data, media, end=1.0)) - 16000) <= 16


def test_a_part_beyond_the_end_is_empty_and_an_end_beyond_it_is_the_end(media):
    data = sound_file(noise(1.0, 16000))
    with pytest.raises(SampleError, match="audio_empty"):
        read_audio(data, media, start=2.0)
    with pytest.raises(SampleError, match="audio_empty"):
        read_audio(data, media, start=0.5, end=0.25)
    assert len(read_audio(data, media, start=0.5, end=99.0)) == 8000


def test_resampling_in_blocks_has_no_seams(monkeypatch, media):
    samples = noise(2.0, 44100)
    data = sound_file(samples, 44100, "WAV", "FLOAT")
    whole = read_audio(data, media)
    monkeypatch.setattr("omni_train.data.samples.media.audio.BLOCK_SAMPLES", 1000)
    np.testing.assert_allclose(read_audio(data, media), whole, atol=1e-6)


def test_only_the_part_that_is_asked_for_counts_against_the_longest(media):
    short = MediaConfig(max_audio_seconds=1.0)
    data = sound_file(noise(3.0, 16000))
    assert len(read_audio(data, short, start=1.0, end=2.0)) == 16000
    for kind in ("flac", "mp3", "m4a"):
        with pytest.raises(SampleError, match="audio_too_long"):
            read_audio(encoded(kind, noise(3.0, 16000), 16000), short)


def test_a_flac_file_that_does_not_say_its_length_is_read_to_its_end(media):
    data = bytearray(sound_file(noise(1.0, 16000)))
    data[21] &= 0xF0
    data[22:26] = bytes(4)  # STREAMINFO's number of samples: unknown
    assert len(read_audio(bytes(data), media)) == 16000


def test_a_wav_file_of_a_writer_that_could_not_go_back_is_whole(media):
    data = bytearray(sound_file(noise(1.0, 16000), format="WAV"))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(data), media)) == 16000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by Linux's /proc")
def test_what_was_read_keeps_no_threads(media):
    """A process forked from this one would wait for them for ever."""
    buffer = io.BytesIO()
    samples = np.round(noise(1.0, 16000).T * 32767).astype(np.int16)
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=16000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).copy(), format="s16", layout="stereo")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    gc.collect()
    before = set(os.listdir("/proc/self/task"))
    gc.disable()  # what holds threads would be freed with them
    try:
        assert len(read_audio(buffer.getvalue(), media)) == 16000
        assert set(os.listdir("/proc/self/task")) <= before
    finally:
        gc.enable()
