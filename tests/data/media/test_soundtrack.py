"""Sound as a player hears it: when beeps sound, what gaps are and how long it all is, against ffmpeg's own decoding."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from omni_train.data.samples.media import audio_seconds, read_audio, read_video
from omni_train.data.samples.media.structure import ogg_checksum
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig
from tests.support.ffmpeg import ffmpeg
from tests.support.media import sound_file

MEDIA = MediaConfig()
BEEPS = (0.5, 1.7, 3.1, 4.4)
SECONDS = 5.0
CUT = (1.4, 3.6)
CLOSE = 0.025  # seconds
GAP = "noise=drop='between(pts*tb,2,3)'"


def beeping(rate: int = 48000) -> np.ndarray:
    """Sound (n, 1) that is silent but for beeps of 80 ms."""
    t = np.arange(round(SECONDS * rate)) / rate
    on = sum((t >= beep) & (t < beep + 0.08) for beep in BEEPS)
    return (0.5 * on * np.sin(2 * np.pi * 880 * t))[:, None].astype(np.float32)


def beeps(waveform: np.ndarray, begin: float = 0.0) -> list[float]:
    """When the beeps begin, in seconds."""
    loud = np.sqrt(np.convolve(waveform**2, np.ones(80) / 80, "same")) > 0.1 * np.abs(waveform).max()
    on = np.flatnonzero(loud[1:] & ~loud[:-1]) / 16000
    return [begin + float(t) for i, t in enumerate(on) if i == 0 or t - on[i - 1] > 0.2]


def heard(file: Path, *other: str) -> np.ndarray:
    """The waveform of 16 kHz that ffmpeg decodes, with its timestamps obeyed as a player does; ``other`` outputs."""
    obeyed = "aresample=async=1:first_pts=0:min_hard_comp=0.015"
    sound = ffmpeg("-i", file, "-map", "0:a:0", "-af", obeyed, "-ac", 1, "-ar", 16000, "-f", "f32le", "-", *other)
    return np.frombuffer(sound, np.float32)


def encoded(folder: Path, name: str, *options: str | float, before: tuple = ()) -> Path:
    """A file of the beeps that ffmpeg makes; ``before`` are other inputs."""
    (folder / "in.wav").write_bytes(sound_file(beeping(), 48000, "WAV"))
    ffmpeg(*before, "-i", folder / "in.wav", *options, folder / name)
    return folder / name


FILES = {
    "WAV of 8 bits": ("x.wav", ("-c:a", "pcm_u8")),
    "WAV of 24 bits": ("x.wav", ("-c:a", "pcm_s24le")),
    "WAV of floats": ("x.wav", ("-c:a", "pcm_f32le")),
    "WAV, mu-law": ("x.wav", ("-c:a", "pcm_mulaw", "-ar", 8000)),
    "WAV, ADPCM": ("x.wav", ("-c:a", "adpcm_ms", "-ar", 22050)),
    "WAV, MP3 inside": ("x.wav", ("-c:a", "libmp3lame", "-ar", 16000)),
    "WAV of 96 kHz": ("x.wav", ("-ar", 96000)),
    "RF64": ("x.wav", ("-rf64", "always")),
    "W64": ("x.w64", ()),
    "AIFF": ("x.aiff", ()),
    "AU": ("x.au", ()),
    "CAF": ("x.caf", ()),
    "CAF, ALAC": ("x.caf", ("-c:a", "alac")),
    "FLAC after an ID3 tag": ("x.flac", ()),
    "M4A": ("x.m4a", ()),
    "M4A, ALAC": ("x.m4a", ("-c:a", "alac")),
    "M4A in fragments": ("x.m4a", ("-movflags", "frag_keyframe+empty_moov", "-frag_duration", 500000)),
    "M4A, Opus": ("x.mp4", ("-c:a", "libopus")),
    "3GP, AMR": ("x.3gp", ("-c:a", "libopencore_amrnb", "-ar", 8000, "-b:a", "12.2k")),
    "AMR": ("x.amr", ("-c:a", "libopencore_amrnb", "-ar", 8000, "-b:a", "12.2k")),
    "3GP": ("x.3gp", ("-c:a", "aac", "-ar", 8000)),
    "M4A that begins late": ("x.m4a", ("-output_ts_offset", 0.7)),
    "Matroska that begins at an hour": ("x.mka", ("-output_ts_offset", 3600)),
    "MP3, variable rate": ("x.mp3", ("-q:a", 5)),
    "MP3, variable rate, no Xing": ("x.mp3", ("-q:a", 5, "-write_xing", 0)),
    "MP3, mono, low rate": ("x.mp3", ("-ar", 16000, "-b:a", "32k")),
    "MP2": ("x.mp2", ()),
    "ADTS": ("x.aac", ("-b:a", "64k")),
    "WMA": ("x.wma", ()),
    "AC3": ("x.ac3", ()),
    "Ogg, Vorbis": ("x.ogg", ("-c:a", "libvorbis")),
    "Ogg, Opus": ("x.opus", ()),
    "Ogg, FLAC": ("x.oga", ("-c:a", "flac")),
    "Ogg, Opus of 60 ms": ("x.opus", ("-frame_duration", 60)),
    "WebM": ("x.webm", ()),
    "Matroska, AAC": ("x.mka", ("-c:a", "aac")),
    "Matroska, PCM": ("x.mka", ("-c:a", "pcm_s16le")),
    "Matroska, live": ("x.mka", ("-c:a", "aac", "-live", 1)),
    "AVI, MP3": ("x.avi", ("-c:a", "libmp3lame")),
    "AVI, PCM": ("x.avi", ("-c:a", "pcm_s16le")),
    "MPEG-TS": ("x.ts", ("-c:a", "aac")),
    "MPEG-TS that begins at an hour": ("x.ts", ("-c:a", "aac", "-output_ts_offset", 3600)),
    "MPEG-PS": ("x.mpg", ("-c:a", "mp2")),
    "FLV": ("x.flv", ("-c:a", "aac")),
    "WavPack": ("x.wv", ()),
    "M4A with a gap": ("x.m4a", ("-bsf:a", GAP)),
    "WebM with a gap": ("x.webm", ("-bsf:a", GAP)),
    "Ogg with a gap": ("x.opus", ("-bsf:a", GAP)),
    "MPEG-TS with a gap": ("x.ts", ("-c:a", "aac", "-bsf:a", GAP)),
    "Matroska with a gap": ("x.mka", ("-c:a", "pcm_s16le", "-bsf:a", GAP)),
    "WebM without one packet": ("x.webm", ("-bsf:a", "noise=drop='eq(n,100)'")),
}


@pytest.mark.parametrize("case", FILES)
def test_beeps_and_lengths_are_those_of_ffmpeg(case, tmp_path):
    name, options = FILES[case]
    file = encoded(tmp_path, name, *options)
    if case.startswith("FLAC after"):
        file.write_bytes(b"ID3\x04\0\0\0\0\0\x0a" + bytes(10) + file.read_bytes())
    data, right = file.read_bytes(), heard(file)
    whole = read_audio(data, MEDIA)
    part = read_audio(data, MEDIA, *CUT)
    assert len(beeps(right)) == 4
    np.testing.assert_allclose(beeps(whole), beeps(right), atol=CLOSE)
    assert abs(len(whole) - len(right)) / 16000 < CLOSE
    assert abs(audio_seconds(data) - len(whole) / 16000) < 0.002
    np.testing.assert_allclose(beeps(part, CUT[0]), [t for t in beeps(right) if CUT[0] < t < CUT[1]], atol=CLOSE)
    assert abs(len(part) / 16000 - (CUT[1] - CUT[0])) < 0.001


VISION = VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8)
SLOW = MediaConfig(video_fps=1.0)
AVC = ("-c:v", "libx264", "-bf", 0, "-preset", "ultrafast")
VIDEOS = {
    "MP4": ("x.mp4", AVC, 0),
    "MP4, sound begins later": ("x.mp4", AVC, 0.7),
    "MP4 with a gap": ("x.mp4", (*AVC, "-bsf:a", GAP), 0),
    "QuickTime, PCM": ("x.mov", (*AVC, "-c:a", "pcm_s16le"), 0.3),
    "WebM, sound begins later": ("x.webm", ("-c:v", "libvpx", "-deadline", "realtime"), 0.7),
    "Matroska with a gap": ("x.mkv", (*AVC, "-bsf:a", GAP), 0),
    "AVI": ("x.avi", ("-c:v", "mpeg4", "-c:a", "libmp3lame"), 0),
    "MPEG-TS, sound begins later": ("x.ts", (*AVC, "-c:a", "aac"), 0.7),
    "FLV": ("x.flv", ("-c:v", "flv", "-c:a", "aac"), 0),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_the_sound_of_a_video_is_that_of_ffmpeg(case, tmp_path):
    name, options, late = VIDEOS[case]
    pictures = ("-f", "lavfi", "-i", "color=s=32x32:r=10:d=6", "-itsoffset", late)
    file = encoded(tmp_path, name, *options, before=pictures)
    # ffmpeg's time 0 is that of the streams which it uses
    data, right = file.read_bytes(), heard(file, "-map", "0:v:0", "-c", "copy", "-f", "null", "/dev/null")
    assert len(beeps(right)) == 4 and abs(beeps(right)[0] - BEEPS[0] - late) < 0.05
    whole = read_video(data, SLOW, VISION, sound=True).waveform
    np.testing.assert_allclose(beeps(whole), beeps(right), atol=CLOSE)
    part = read_video(data, SLOW, VISION, sound=True, start=CUT[0], end=CUT[1]).waveform
    np.testing.assert_allclose(beeps(part, CUT[0]), [t for t in beeps(right) if CUT[0] < t < CUT[1]], atol=CLOSE)
    np.testing.assert_allclose(beeps(read_audio(data, MEDIA)), beeps(right), atol=CLOSE)  # its sound alone


@pytest.mark.parametrize("name", ["x.m4a", "x.mp3", "x.mka", "x.ts", "x.opus", "x.webm", "x.wma"])
def test_what_was_cut_without_encoding_anew_is_that_of_ffmpeg(name, tmp_path):
    whole = encoded(tmp_path, f"whole{name[1:]}", *(("-c:a", "aac") if name in ("x.mka", "x.ts") else ()))
    ffmpeg("-ss", 1.23, "-i", whole, "-c", "copy", tmp_path / name)
    data, right = (tmp_path / name).read_bytes(), heard(tmp_path / name)
    assert len(beeps(right)) >= 3
    np.testing.assert_allclose(beeps(read_audio(data, MEDIA)), beeps(right), atol=CLOSE)
    part = read_audio(data, MEDIA, 1.0, 2.5)
    np.testing.assert_allclose(beeps(part, 1.0), [t for t in beeps(right) if 1 < t < 2.5], atol=CLOSE)


def test_a_part_within_a_gap_is_silence(tmp_path):
    data = encoded(tmp_path, "x.m4a", "-bsf:a", GAP).read_bytes()
    waveform = read_audio(data, MEDIA, 2.2, 2.7)
    assert len(waveform) == 8000 and not waveform.any()


UNWRITTEN = (0, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, size) for kind in ("RIFF", "FORM") for size in UNWRITTEN), ("AU", 0xFFFFFFFF)]
)
def test_sizes_that_were_never_written_are_those_of_the_file(kind, size):
    data = bytearray(sound_file(beeping(16000), 16000, {"RIFF": "WAV", "FORM": "AIFF", "AU": "AU"}[kind]))
    order = "little" if kind == "RIFF" else "big"
    at = 8 if kind == "AU" else data.index(b"data" if kind == "RIFF" else b"SSND") + 4
    if kind == "FORM":
        frames = data.index(b"COMM") + 10
        data[frames : frames + 4] = bytes(4) if size == 0 else (size // 2).to_bytes(4)
    for place in {at, at if kind == "AU" else 4}:
        data[place : place + 4] = size.to_bytes(4, order)
    waveform = read_audio(bytes(data), MEDIA)
    assert abs(len(waveform) / 16000 - SECONDS) < 0.001
    np.testing.assert_allclose(beeps(waveform), BEEPS, atol=CLOSE)
    assert abs(audio_seconds(bytes(data)) - SECONDS) < 0.001
    assert len(beeps(read_audio(bytes(data), MEDIA, *CUT))) == 2


@pytest.mark.parametrize("name", ["x.opus", "x.ogg"])
def test_an_ogg_file_without_the_flag_of_its_end_is_whole(name, tmp_path):
    file = encoded(tmp_path, name, *(() if name == "x.opus" else ("-c:a", "libvorbis")))
    data = bytearray(file.read_bytes())
    page = data.rfind(b"OggS")
    data[page + 5] &= ~4
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = ogg_checksum(bytes(data[page:])).to_bytes(4, "little")
    file.write_bytes(data)
    waveform = read_audio(bytes(data), MEDIA)
    assert abs(len(waveform) - len(heard(file))) / 16000 < CLOSE
    np.testing.assert_allclose(beeps(waveform), BEEPS, atol=CLOSE)
    empty = bytearray(data[page : page + 26]) + b"\0"  # a last page without segments, as some encoders write it
    empty[5], empty[22:26] = 4, bytes(4)
    empty[22:26] = ogg_checksum(bytes(empty)).to_bytes(4, "little")
    assert len(read_audio(bytes(data + empty), MEDIA)) == len(waveform)


JOINED = {
    "MP3": ("x.mp3", ()),
    "ADTS": ("x.aac", ()),
    "Ogg, Opus": ("x.opus", ()),
    "Ogg, Vorbis": ("x.ogg", ("-c:a", "libvorbis")),
    "MPEG-TS": ("x.ts", ("-c:a", "aac")),
    "WebM": ("x.webm", ()),
}


@pytest.mark.parametrize("case", JOINED)
def test_files_that_were_joined_follow_each_other(case, tmp_path):
    name, options = JOINED[case]
    one = encoded(tmp_path, name, *options).read_bytes()
    alone = beeps(read_audio(one, MEDIA))
    seconds = audio_seconds(one)
    whole = read_audio(one + one, MEDIA)
    assert abs(len(whole) / 16000 - 2 * seconds) < 0.1
    twice = alone + [t + seconds for t in alone]
    np.testing.assert_allclose(beeps(whole), twice, atol=0.1)  # lossy encoders add silence at both ends
    assert abs(audio_seconds(one + one) - len(whole) / 16000) < CLOSE
    part = read_audio(one + one, MEDIA, 6.0, 9.0)
    np.testing.assert_allclose(beeps(part, 6.0), [t for t in beeps(whole) if 6 < t < 9], atol=CLOSE)


def test_joined_files_may_have_other_rates(tmp_path):
    fast, slow = (encoded(tmp_path, f"{rate}.mp3", "-ar", rate).read_bytes() for rate in (44100, 22050))
    whole = beeps(read_audio(fast + slow, MEDIA))
    np.testing.assert_allclose(whole, [*BEEPS, *(t + SECONDS for t in BEEPS)], atol=0.1)


def test_what_a_file_has_twice_is_heard_once(tmp_path):
    file = encoded(tmp_path, "x.opus")
    ffmpeg("-ss", 3.5, "-i", file, "-copyts", "-c", "copy", tmp_path / "end.opus")
    whole = read_audio(file.read_bytes() + (tmp_path / "end.opus").read_bytes(), MEDIA)
    assert abs(len(whole) / 16000 - SECONDS) < CLOSE
    np.testing.assert_allclose(beeps(whole), BEEPS, atol=CLOSE)


@pytest.mark.parametrize("name", ["x.m4a", "x.mp3", "x.mka", "x.aac"])
def test_one_packet_that_cannot_be_decoded_is_silence_and_many_are_damage(name, tmp_path):
    good = encoded(tmp_path, name, *(("-c:a", "aac") if name == "x.mka" else ())).read_bytes()
    with av.open(io.BytesIO(good)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    largest = [0, *itertools.accumulate(map(len, packets), max)]  # before each
    second = range(round(1.7 / SECONDS * len(packets)), round(1.8 / SECONDS * len(packets)))  # beep
    sounding = max((packets[i] for i in second if len(packets[i]) <= largest[i]), key=len)
    header = {"x.mp3": 4, "x.aac": 7}.get(name, 0)
    # Decoders of MP3 take noise for sound; the parser of ADTS takes ones for headers.
    noise = b"\xff" * 9999 if name == "x.mp3" else np.random.default_rng(3).integers(1, 254, 9999, np.uint8).tobytes()
    broken = sounding[:header] + noise[: len(sounding) - header]
    whole, right = read_audio(good.replace(sounding, broken), MEDIA), read_audio(good, MEDIA)
    assert abs(len(whole) - len(right)) / 16000 < CLOSE
    np.testing.assert_allclose(beeps(whole)[2:], beeps(right)[2:], atol=0.001)
    assert np.abs(whole[: len(right)] - right[: len(whole)]).max() > 0.1
    worse = good
    for packet in set(packets[len(packets) // 2 :]):
        if len(packet) > 60:
            worse = worse.replace(packet, packet[:header] + noise[: len(packet) - header])
    with pytest.raises(SampleError, match="audio_damaged"):
        read_audio(worse, MEDIA)


def test_a_matroska_file_of_which_a_piece_is_overwritten_is_damaged(tmp_path):
    data = bytearray(encoded(tmp_path, "x.webm").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = b"\xff" * 200
    with pytest.raises(SampleError, match="audio_damaged"):
        read_audio(bytes(data), MEDIA)


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.mka"])
@pytest.mark.parametrize("layout", ["quad", "5.1", "7.1"])
def test_more_channels_than_two_are_mixed_as_ffmpeg_mixes_them(name, layout, tmp_path):
    codec = () if name != "x.mka" else ("-c:a", "aac")
    for place in ("FL", "FC" if layout != "quad" else "BL"):
        file = encoded(tmp_path, name, "-af", f"pan={layout}|{place}=c0", *codec)
        level = np.abs(read_audio(file.read_bytes(), MEDIA)).max() / np.abs(heard(file)).max()
        assert abs(20 * np.log10(level)) < 0.3
