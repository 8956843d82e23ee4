"""Broken files: each costs its sample, under one reason, and leaves nothing behind."""

import io
import os
import struct
import zlib
from collections import Counter
from functools import cache

import av
import numpy as np
import pytest

from omni_train.data.samples.media import read_audio, read_image, read_video
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig
from tests.support.media import aac_file, image_file, png_chunk, sound_file, tone, video_file

MEDIA = MediaConfig()
VISION = VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8)
READ = {
    "audio": lambda data: read_audio(data, MEDIA),
    "image": lambda data: read_image(data, MEDIA, VISION),
    "video": lambda data: read_video(data, MEDIA, VISION, sound=True),
}


def refusal(medium: str, data: bytes) -> str | None:
    """Why the file is refused; None if it is not. Any other error passes through."""
    try:
        READ[medium](data)
    except SampleError as error:
        return error.reason
    return None


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def speech(seconds: float = 1.0) -> np.ndarray:
    samples = tone(seconds)
    return samples + 0.05 * np.random.default_rng(8).standard_normal(samples.shape).astype(np.float32)


@cache
def good() -> dict[str, bytes]:
    frames, samples = noise(12, 48, 64, 3), speech()
    return {
        "flac": sound_file(samples),
        "wav": sound_file(samples, format="WAV"),
        "ogg": sound_file(samples, format="OGG"),
        "mp3": sound_file(samples, format="MP3"),
        "m4a": aac_file(samples),
        "aac": aac_file(samples, container="adts"),
        "jpg": image_file(noise(60, 80, 3), "JPEG"),
        "png": image_file(noise(60, 80, 3), "PNG"),
        "webp": image_file(noise(60, 80, 3), "WEBP"),
        "gif": image_file(noise(60, 80, 3), "GIF"),
        "bmp": image_file(noise(60, 80, 3), "BMP"),
        "tif": image_file(noise(60, 80, 3), "TIFF"),
        "avif": image_file(noise(60, 80, 3), "AVIF"),
        "jp2": image_file(noise(60, 80, 3), "JPEG2000"),
        "mp4": video_file(frames, sound=samples),
        "webm": video_file(frames, 8, "webm", "libvpx-vp9", sound=samples, sound_codec="libopus"),
        "mkv": video_file(frames, 8, "matroska", sound=samples),
        "silent.mp4": video_file(frames),
        "avi": video_file(frames, 8, "avi", "mpeg4", sound=samples, sound_codec="mp3"),
        "ts": video_file(frames, 8, "mpegts", sound=samples),
    }


MEDIUM = dict(flac="audio", wav="audio", ogg="audio", mp3="audio", m4a="audio", aac="audio", jpg="image", png="image")
MEDIUM |= dict.fromkeys(("webp", "gif", "bmp", "tif", "avif", "jp2"), "image") | {"avi": "video", "ts": "video"}
MEDIUM |= {"mp4": "video", "webm": "video", "mkv": "video", "silent.mp4": "video"}


def float_wav(value: float) -> bytes:
    samples = speech()
    samples[4321] = value
    return sound_file(samples, format="WAV", subtype="FLOAT")


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def overwritten(name: str, begin: float, length: int) -> bytes:
    """A good file with random bytes from a fraction of it on."""
    data = bytearray(good()[name])
    at = int(len(data) * begin)
    data[at : at + length] = np.random.default_rng(9).bytes(length)
    return bytes(data)


BROKEN = {
    "a FLAC file cut in half": ("audio", lambda: good()["flac"][:9000], "audio_damaged"),
    "a FLAC file without its last bytes": ("audio", lambda: good()["flac"][:-50], "audio_damaged"),
    "a FLAC file with noise in its middle": ("audio", lambda: overwritten("flac", 0.5, 300), "audio_damaged"),
    "random bytes after the header of a FLAC file": (
        "audio",
        lambda: overwritten("flac", 0.004, 9**5),
        "audio_damaged",
    ),
    "a FLAC header alone": ("audio", lambda: good()["flac"][:40], "audio_unreadable"),
    "a WAV file cut in half": ("audio", lambda: good()["wav"][:16000], "audio_damaged"),
    "an Ogg file cut in half": ("audio", lambda: good()["ogg"][:5000], "audio_damaged"),
    "an Ogg file without its last bytes": ("audio", lambda: good()["ogg"][:-50], "audio_damaged"),
    "an Ogg file with noise in its middle": ("audio", lambda: overwritten("ogg", 0.5, 300), "audio_damaged"),
    "an AIFF file cut in half": ("audio", lambda: sound_file(speech(), format="AIFF")[:16000], "audio_damaged"),
    "a CAF file cut in half": ("audio", lambda: sound_file(speech(), format="CAF")[:16000], "audio_damaged"),
    "a W64 file cut in half": ("audio", lambda: sound_file(speech(), format="W64")[:16000], "audio_damaged"),
    "an RF64 file cut in half": ("audio", lambda: sound_file(speech(), format="RF64")[:16000], "audio_damaged"),
    "an AU file cut in half": ("audio", lambda: sound_file(speech(), format="AU")[:16000], "audio_damaged"),
    "an MP3 file cut in half": ("audio", lambda: good()["mp3"][:2500], "audio_damaged"),
    "an MP3 file with noise in its middle": ("audio", lambda: overwritten("mp3", 0.5, 500), "audio_damaged"),
    "an M4A file cut in half": ("audio", lambda: good()["m4a"][:6000], "audio_damaged"),
    "an AAC stream cut in half": ("audio", lambda: good()["aac"][:6000], "audio_damaged"),
    "a text as sound": ("audio", lambda: b"Not a sound at all.\n" * 200, "audio_unreadable"),
    "a picture as sound": ("audio", lambda: good()["png"], "audio_unreadable"),
    "a silent video as sound": ("audio", lambda: good()["silent.mp4"], "audio_unreadable"),
    "random bytes as sound": ("audio", lambda: np.random.default_rng(1).bytes(5000), "audio_unreadable"),
    "a playlist that names a file": (
        "audio",
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "audio_unreadable",
    ),
    "an empty file as sound": ("audio", lambda: b"", "audio_empty"),
    "a WAV file of no samples": ("audio", lambda: sound_file(speech()[:0], format="WAV"), "audio_empty"),
    "a WAV file of 6 ms": ("audio", lambda: sound_file(speech()[:100], format="WAV"), "audio_empty"),
    "a sample that is NaN": ("audio", lambda: float_wav(np.nan), "audio_not_finite"),
    "a sample that is infinite": ("audio", lambda: float_wav(-np.inf), "audio_not_finite"),
    "a sample of 1e30": ("audio", lambda: float_wav(1e30), "audio_not_finite"),
    "one sample a second": ("audio", lambda: sound_file(speech(), 1, "WAV"), "audio_sample_rate"),
    "two thousand million samples a second": (
        "audio",
        lambda: sound_file(speech(), 2**31 - 1, "WAV"),
        "audio_sample_rate",
    ),
    "eleven hours in a small file": (
        "audio",
        lambda: sound_file(np.zeros((11 * 3600 * 1000, 1), np.int16), 1000, "FLAC"),
        "audio_too_long",
    ),
    "a JPEG file cut in half": ("image", lambda: good()["jpg"][:3000], "image_damaged"),
    "a PNG file cut in half": ("image", lambda: good()["png"][:7000], "image_damaged"),
    "a PNG file with noise in its middle": ("image", lambda: overwritten("png", 0.5, 100), "image_damaged"),
    "a WebP file cut in half": ("image", lambda: good()["webp"][:2000], "image_damaged"),
    "a GIF file cut in half": ("image", lambda: good()["gif"][:2500], "image_damaged"),
    "a BMP file cut in half": ("image", lambda: good()["bmp"][:7000], "image_damaged"),
    "an AVIF file cut in half": ("image", lambda: good()["avif"][:2000], "image_damaged"),
    "a JPEG 2000 file cut in half": ("image", lambda: good()["jp2"][:7000], "image_damaged"),
    "a JPEG file without the last of its pixels": ("image", lambda: good()["jpg"][:-6], "image_damaged"),
    "a PNG file with too few pixels": ("image", lambda: png(64, 64, bytes(99)), "image_damaged"),
    "random bytes after the header of a JPEG file": ("image", lambda: overwritten("jpg", 0.3, 9**5), "image_damaged"),
    "a PNG header alone": ("image", lambda: good()["png"][:20], "image_unreadable"),
    "a PNG header of 100,000 x 100,000 pixels": ("image", lambda: png(100_000, 100_000), "image_too_large"),
    "a bomb of pixels that compress well": ("image", lambda: png(14_000, 14_000, bytes(10**7)), "image_too_large"),
    "a PNG file of no pixels": ("image", lambda: png(0, 10), "image_unreadable"),
    "an image one pixel high": ("image", lambda: image_file(noise(1, 300, 3)), "image_extreme_ratio"),
    "a text as an image": ("image", lambda: b"<svg>none</svg>" * 30, "image_unreadable"),
    "sound as an image": ("image", lambda: good()["wav"], "image_unreadable"),
    "an empty file as an image": ("image", lambda: b"", "image_empty"),
    "a PostScript file, which Pillow would hand to a program": (
        "image",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "image_unreadable",
    ),
    "an MP4 file cut in half": ("video", lambda: good()["mp4"][:9000], "video_damaged"),
    "an MP4 file without its last bytes": ("video", lambda: good()["mp4"][:-50], "video_damaged"),
    "a WebM file cut in half": ("video", lambda: good()["webm"][:9000], "video_damaged"),
    "an MKV file cut in half": ("video", lambda: good()["mkv"][:9000], "video_damaged"),
    "the header of an MKV file alone": ("video", lambda: good()["mkv"][:400], "video_damaged"),
    "a video with noise in its middle": ("video", lambda: overwritten("silent.mp4", 0.4, 2000), "video_damaged"),
    "an MP4 file of no frames": ("video", lambda: video_file(noise(0, 48, 64, 3)), "video_empty"),
    "an MKV file of no frames": ("video", lambda: video_file(noise(0, 48, 64, 3), 8, "matroska"), "video_empty"),
    "an MP4 file without pictures": ("video", lambda: good()["m4a"], "video_unreadable"),
    "sound as a video": ("video", lambda: good()["mp3"], "video_unreadable"),
    "a picture as a video": ("video", lambda: good()["jpg"], "video_unreadable"),
    "a text as a video": ("video", lambda: b"Not a video at all.\n" * 200, "video_unreadable"),
    "an empty file as a video": ("video", lambda: b"", "video_empty"),
    "frames of a million pixels where fewer are allowed": (
        "small video",
        lambda: video_file(noise(2, 1000, 1002, 3), codec="mpeg4"),
        "video_too_large",
    ),
    "a video 4 pixels high": ("video", lambda: video_file(noise(2, 4, 1000, 3), codec="mpeg4"), "video_extreme_ratio"),
    "a video whose sound is damaged": ("video", lambda: sound_damaged(), "audio_damaged"),
}
READ["small video"] = lambda data: read_video(data, MediaConfig(max_source_pixels=10**6), VISION, sound=False)


def sound_damaged() -> bytes:
    """A video with its pictures whole and noise in all packets of sound."""
    data = bytearray(good()["mp4"])
    with av.open(io.BytesIO(bytes(data))) as container:
        for packet in container.demux(audio=0):
            if packet.size:
                data[packet.pos : packet.pos + packet.size] = np.random.default_rng(packet.pos).bytes(packet.size)
    return bytes(data)


@pytest.mark.parametrize("name", MEDIUM)
def test_the_files_that_are_broken_here_are_good(name):
    assert refusal(MEDIUM[name], good()[name]) is None


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_for_its_own_reason(case, capfd):
    medium, make, reason = BROKEN[case]
    data = make()
    capfd.readouterr()  # what encoders say is not ours
    assert refusal(medium, data) == reason
    assert capfd.readouterr() == ("", ""), "a library speaks"


@pytest.mark.parametrize("name", MEDIUM)
def test_random_damage_is_a_refusal_or_nothing(name, capfd):
    rng = np.random.default_rng(sum(name.encode()))
    capfd.readouterr()
    outcomes = Counter()
    for _ in range(40):
        data = bytearray(good()[name])
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)) if rng.random() < 0.6 else rng.integers(min(200, len(data))))
            data[at : at + int(rng.integers(1, 20))] = rng.bytes(int(rng.integers(1, 20)))
        outcomes[
            refusal(MEDIUM[name], bytes(data[: len(data) if rng.random() < 0.7 else rng.integers(len(data))]))
        ] += 1
    assert any(outcomes) and capfd.readouterr() == ("", "")


def test_thousands_of_files_leave_no_memory_threads_or_open_files_behind():
    small_sound, small_frames = speech(0.1), noise(4, 32, 32, 3)
    files = [("audio", sound_file(small_sound, format=kind)) for kind in ("FLAC", "WAV", "OGG", "MP3")]
    files += [("audio", aac_file(small_sound)), ("image", image_file(noise(40, 40, 3), "JPEG"))]
    files += [("image", image_file(noise(40, 40, 3), "WEBP")), ("video", video_file(small_frames, sound=small_sound))]
    files += [("video", video_file(small_frames, 8, "webm", "libvpx"))]
    files += [(medium, data[: len(data) // 2]) for medium, data in files]
    files += [
        (medium, make()) for name, (medium, make, _) in BROKEN.items() if "eleven" not in name and "million" not in name
    ]

    def left() -> tuple[int, int, int]:
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def read(samples: int) -> None:
        for index in range(samples):
            refusal(*files[index % len(files)])

    read(300)
    resident, descriptors, threads = left()
    read(3000)
    assert left()[1:] == (descriptors, threads)
    assert left()[0] - resident < 24 << 20
