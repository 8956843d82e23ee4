"""Which frame stands at which time, in containers of every kind, against what ffmpeg shows."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest

from omni_train.data.samples.media import read_video
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig
from tests.support.ffmpeg import ffmpeg

STEP = 6  # of brightness from one frame to the next
GREY = "geq=lum='40+6*N':cb=128:cr=128"
FILM = ("-f", "lavfi", "-i", f"color=s=64x64:r=10:d=3,{GREY}")
WIDE = ("-f", "lavfi", "-i", f"color=s=128x96:r=10:d=3,{GREY}")
FAST = ("-f", "lavfi", "-i", f"color=s=64x64:r=25:d=1.2,{GREY}")
DISC = ("-f", "lavfi", "-i", f"color=s=720x576:r=25:d=0.6,{GREY}")
TONE = ("-f", "lavfi", "-i", "sine=d=3")
WHITE = ("-f", "lavfi", "-i", "color=white:s=64x64:r=10:d=3")
SEEN_AND_HEARD = ("-map", "1:v", "-map", "0:a", "-c:a", "aac")
VARYING = ("-vf", "setpts='if(lt(N,10),N,3*N-20)/10/TB'", "-fps_mode", "vfr")


def x264(*more: str) -> tuple[str, ...]:
    """A keyframe every second, and two frames of three built on what comes after them."""
    options = ["keyint=10", "min-keyint=10", "scenecut=0", "bframes=2", "b-adapt=0", "log-level=none", *more]
    return "-c:v", "libx264", "-pix_fmt", "yuv420p", "-x264-params", ":".join(options)


X265 = ("-c:v", "libx265", "-pix_fmt", "yuv420p", "-x265-params", "keyint=10:min-keyint=10:pools=1:log-level=none")
VP8 = ("-c:v", "libvpx", "-g", "10", "-auto-alt-ref", "1", "-lag-in-frames", "12")
VP9 = ("-c:v", "libvpx-vp9", "-g", "10", "-auto-alt-ref", "1", "-lag-in-frames", "12", "-pix_fmt", "yuv420p")
AV1 = ("-c:v", "libaom-av1", "-cpu-used", "8", "-g", "10", "-pix_fmt", "yuv420p")
MPEG2 = ("-c:v", "mpeg2video", "-g", "10", "-bf", "2")


def film(*arguments: str | Path, name: str = "film.mp4") -> Callable[[Path], Path]:
    """A maker of the file that ffmpeg writes with these arguments."""

    def make(folder: Path) -> Path:
        ffmpeg(*arguments, folder / name)
        return folder / name

    return make


def cut(make: Callable[[Path], Path], name: str, begin: float = 1.25) -> Callable[[Path], Path]:
    """A maker of a file cut without decoding, which begins with a keyframe from before the cut."""

    def copy(folder: Path) -> Path:
        (folder / "whole").mkdir()
        ffmpeg("-ss", begin, "-i", make(folder / "whole"), "-c", "copy", folder / name)
        return folder / name

    return copy


def from_its_middle(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """A maker of a stream whose beginning was never received."""

    def rest(folder: Path) -> Path:
        file = make(folder)
        data = file.read_bytes()
        file.write_bytes(data[len(data) // 188 // 5 * 188 :])
        return file

    return rest


def with_cover(folder: Path) -> Path:
    """A film whose first stream of pictures is its cover."""
    ffmpeg("-f", "lavfi", "-i", "color=red:s=96x96", "-frames:v", 1, folder / "cover.png")
    ffmpeg(*FILM, *x264(), folder / "film.mp4")
    streams = ("-i", folder / "cover.png", "-i", folder / "film.mp4", "-map", 0, "-map", 1, "-c", "copy")
    ffmpeg(*streams, "-disposition:v:0", "attached_pic", folder / "covered.mp4")
    return folder / "covered.mp4"


ODD = {
    "MP4": film(*FILM, *x264()),
    "MP4 cut": cut(film(*FILM, *x264()), "cut.mp4"),
    "MP4 without B-frames, cut": cut(film(*FILM, *x264("bframes=0")), "cut.mp4"),
    "MP4 with sound, cut": cut(film(*TONE, *FILM, *SEEN_AND_HEARD, *x264()), "cut.mp4"),
    "MP4 of HEVC, cut": cut(film(*FILM, *X265), "cut.mp4"),
    "MP4 of VP9, cut": cut(film(*FILM, *VP9), "cut.mp4"),
    "Matroska cut": cut(film(*FILM, *x264()), "cut.mkv"),
    "WebM of AV1, cut": cut(film(*FILM, *AV1), "cut.webm"),
    "MPEG-TS cut": cut(film(*FILM, *x264()), "cut.ts"),
    "open groups of pictures": film(*FILM, *x264("open-gop=1")),
    "open groups of pictures in HEVC": film(*FILM, *X265, name="film.ts"),
    "an open group first": cut(film(*FILM, *x264("open-gop=1"), name="film.ts"), "cut.ts", 1.0),
    "no keyframe but the first": film(*FILM, *x264("intra-refresh=1", "bframes=0"), name="film.ts"),
    "a rate that varies": film(*FILM, *VARYING, *x264(), name="film.mkv"),
    "frames that are not shown, VP8": film(*FILM, *VP8, name="film.webm"),
    "frames that are not shown, VP9": film(*FILM, *VP9, name="film.webm"),
    "AV1": film(*FILM, *AV1),
    "MPEG-TS that begins after a day": film(*FILM, *x264(), "-output_ts_offset", 80000, name="film.ts"),
    "MPEG-TS whose clock turns over": film(*FILM, *x264(), "-output_ts_offset", 95441.5, name="film.ts"),
    "MPEG-TS from its middle": from_its_middle(film(*FILM, *MPEG2, "-b:v", "300k", name="film.ts")),
    "MPEG-PS": film(*FILM, *MPEG2, "-b:v", "300k", name="film.mpg"),
    "MPEG-PS whose clock goes back": film(*FILM, *MPEG2, name="film.mpg"),
    "AVI": film(*FILM, "-c:v", "mpeg4", "-g", 10, "-bf", 2, name="film.avi"),
    "AVI of two frames in a packet": film(*FILM, "-c:v", "libxvid", "-g", 10, "-bf", 2, name="film.avi"),
    "AVI without stamps": film(*FILM, *x264(), name="film.avi"),
    "AVI of JPEG": film(*FILM, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", name="film.avi"),
    "QuickTime of JPEG": film(*FILM, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", name="film.mov"),
    "QuickTime of ProRes": film(*FILM, "-c:v", "prores_ks", name="film.mov"),
    "pictures after sound, MP4": film(*TONE, "-itsoffset", 0.5, *FILM, *SEEN_AND_HEARD, *x264()),
    "pictures after sound, Matroska": film(*TONE, "-itsoffset", 0.5, *FILM, *SEEN_AND_HEARD, *x264(), name="film.mkv"),
    "pictures after sound, MPEG-TS": film(*TONE, *FILM, *SEEN_AND_HEARD, *x264(), name="film.ts"),
    "sound after pictures": film("-itsoffset", 0.5, *TONE, *FILM, *SEEN_AND_HEARD, *x264()),
    "an empty edit first": film(*FILM, *x264(), "-output_ts_offset", 2),
    "times below 0": film(*FILM, *x264(), "-output_ts_offset", -1, "-avoid_negative_ts", "disabled"),
    "interlaced H.264": film(*FILM, *x264("interlaced=1"), name="film.ts"),
    "interlaced MPEG-2": film(*FILM, *MPEG2, "-flags", "+ilme+ildct", name="film.mpg"),
    "a packet lost": film(*FILM, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", "-bsf:v", "noise=drop='eq(n,14)'"),
    "fragments": film(*FILM, *x264(), "-movflags", "frag_keyframe+empty_moov"),
    "a cover": with_cover,
    "a track that is switched off": film(
        *WHITE, *FILM, "-map", 0, "-map", 1, *x264(), "-disposition:v:0", 0, "-disposition:v:1", "default"
    ),
    "Flash": film(*FILM, *x264(), name="film.flv"),
    "Windows Media": film(*FILM, "-c:v", "wmv2", "-g", 10, name="film.wmv"),
    "Theora": film(*FILM, "-c:v", "libtheora", "-g", 10, "-pix_fmt", "yuv420p", name="film.ogv"),
    "GIF": film(*FILM, name="film.gif"),
    "3GP": film(*WIDE, "-c:v", "h263", "-g", 10, name="film.3gp"),
    "RealMedia": film(*FILM, "-c:v", "rv10", "-g", 10, "-b:v", "100k", name="film.rm"),
    "MXF": film(*FAST, *MPEG2, name="film.mxf"),
    "DV": film(*DISC, "-c:v", "dvvideo", "-pix_fmt", "yuv420p", name="film.dv"),
    "NUT": film(*FILM, *x264(), name="film.nut"),
    "IVF": film(*FILM, *VP9, name="film.ivf"),
    "H.264 alone": film(*FILM, *x264(), name="film.h264"),
    "HEVC alone": film(*FILM, *X265, name="film.hevc"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Callable[[str], Path]:
    """odd(name) is the file of that name, made once."""
    return cache(lambda name: ODD[name](tmp_path_factory.mktemp("odd")))


@pytest.fixture
def vision(vision):
    return replace(vision, temporal_patch_size=1)


def shown(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """When ffmpeg shows frames, in seconds, and which: their numbers in the film, which their brightness tells."""
    measure = "scale=out_range=tv,format=yuv420p,signalstats,metadata=print:key=lavfi.signalstats.YAVG:file=-"
    said = ffmpeg("-i", file, "-vf", measure, "-fps_mode", "passthrough", "-f", "null", "-").decode()
    times, levels = (np.array(re.findall(tag, said), float) for tag in (r"pts_time:(\S+)", r"YAVG=(\S+)"))
    later = times > np.maximum.accumulate(np.concatenate([[-1], times[:-1]]))  # than all before, or never in its place
    return times[later], numbers(levels[later])


def numbers(levels: np.ndarray) -> np.ndarray:
    return np.rint((levels - 40) / STEP).astype(int)


def read(file: Path, vision, **options) -> tuple[np.ndarray, np.ndarray]:
    """As ``shown``, of the frames that are sampled."""
    cut = {key: options.pop(key) for key in ("start", "end") if key in options}
    media = MediaConfig(video_min_pixels=64, video_max_frames=1000, **options)
    video = read_video(file.read_bytes(), media, vision, sound=False, **cut)
    return video.seconds, numbers(video.patches.reshape(video.grid[0], -1).mean(axis=1) * 219 / 255 + 16)


@pytest.mark.parametrize("name", ODD)
def test_every_frame_stands_where_ffmpeg_shows_it(name, odd, vision):
    times, frames = shown(odd(name))
    assert len(frames) > 9 and len(set(frames)) == len(frames)
    seconds, found = read(odd(name), vision, video_fps=1000.0)
    assert found.tolist() == frames.tolist()
    np.testing.assert_allclose(seconds, times, atol=2e-3)


@pytest.mark.parametrize("name", ODD)
def test_sampled_frames_are_those_that_ffmpeg_shows_then(name, odd, vision):
    times, frames = shown(odd(name))
    start = times[0] + 0.45 * (times[-1] - times[0]) + 0.013
    for number, cut in [(2, {}), (5, {}), (3, dict(start=start)), (3, dict(start=start, end=start + 0.4))]:
        seconds, found = read(odd(name), vision, video_fps=0.1, video_min_frames=number, **cut)
        assert len(found) == number
        at = np.searchsorted(times, seconds + cut.get("start", 0.0) + 2e-3, side="right") - 1
        assert found.tolist() == frames[at].tolist()


def damaged(file: Path, places: list[int]) -> bytes:
    """The file with noise in the bodies of packets."""
    data = bytearray(file.read_bytes())
    with av.open(io.BytesIO(bytes(data))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for place in places:
        begin, end = packets[place].pos + min(12, packets[place].size // 3), packets[place].pos + packets[place].size
        data[begin:end] = np.random.default_rng(place).bytes(end - begin)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("film.mp4", x264()),
        ("film.mkv", x264("bframes=0")),
        ("film.avi", ("-c:v", "mpeg4", "-g", 10)),
        ("film.webm", VP9),
        ("film.mov", ("-c:v", "mjpeg", "-pix_fmt", "yuvj420p")),
    ],
)
def test_a_broken_packet_costs_what_builds_on_it(name, codec, tmp_path, vision):
    file = film(*FILM, "-vf", "noise=alls=8:allf=t", *codec, name=name)(tmp_path)
    times, frames = shown(file)
    (tmp_path / name).write_bytes(damaged(file, [26]))
    seconds, found = read(file, vision, video_fps=1000.0)
    assert set(range(24)) <= set(found) < set(frames)
    np.testing.assert_allclose(seconds, times[np.isin(frames, found)], atol=2e-3)


def test_a_video_that_has_lost_too_much_is_refused(tmp_path, vision):
    file = film(*FILM, "-vf", "noise=alls=8:allf=t", *x264())(tmp_path)
    file.write_bytes(damaged(file, [3, 12, 22]))
    with pytest.raises(SampleError, match="video_damaged"):
        read(file, vision, video_fps=1000.0)


@pytest.mark.parametrize("name", ["MP4 cut", "MPEG-TS cut", "Matroska cut", "AVI", "MP4 of VP9, cut"])
def test_frames_that_are_where_their_packets_say_are_decoded_once(name, odd, vision, decodings):
    _, found = read(odd(name), vision, video_fps=1000.0)
    assert len(decodings) == len(found)
