"""Sampled frames, their times and their sound, against transformers' processor given all frames."""

import io
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from omni_train.data.samples.features.patches import patchify
from omni_train.data.samples.media import read_video
from omni_train.data.samples.sample import SampleError
from omni_train.recipe.schema import MediaConfig, VisionEncoderConfig
from tests.support.ffmpeg import ffmpeg
from tests.support.media import tone, video_file


def moving(frames: int, height: int = 50, width: int = 70) -> np.ndarray:
    """Smooth pictures (n, height, width, 3) that brighten: the mean tells which it is."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.linspace(20, 180, frames)[:, None, None]
    shades = [ramp + x * 50 / width, ramp + y * 50 / height, ramp + 0 * x]
    return np.stack(shades, axis=3).astype(np.uint8)


def decoded(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def one_frame(vision: VisionEncoderConfig) -> VisionEncoderConfig:
    """The same encoder with patches of a single frame."""
    return replace(vision, temporal_patch_size=1)


def brightness(video) -> np.ndarray:
    return video.patches.reshape(video.grid[0], -1).mean(axis=1)


@pytest.mark.parametrize(("frames", "fps"), [(24, 8), (61, Fraction(30000, 1001)), (31, 12), (5, 25), (100, 10)])
@pytest.mark.parametrize("container", ["mp4", "matroska", "webm"])
def test_frames_grids_and_times_equal_qwen3_vls(frames, fps, container, media, vision):
    data = video_file(moving(frames), fps, container, "libvpx-vp9" if container == "webm" else "libx264")
    processor = Qwen3VLVideoProcessor(size=dict(shortest_edge=4096, longest_edge=25165824), cap_pixels_per_frame=False)
    expected = processor(
        videos=[torch.from_numpy(decoded(data)).permute(0, 3, 1, 2)],
        video_metadata=[VideoMetadata(total_num_frames=frames, fps=float(fps))],
        do_sample_frames=True,
        return_metadata=True,
        return_tensors="np",
    )
    found = read_video(data, media, vision, sound=False)
    assert found.grid == tuple(expected["video_grid_thw"][0])
    reference = np.rint((expected["pixel_values_videos"] + 1) * 127.5).astype(np.uint8)
    assert np.array_equal(found.patches, reference)
    times = Qwen3VLProcessor._calculate_timestamps(None, expected["video_metadata"][0].frames_indices, float(fps))
    np.testing.assert_allclose(found.seconds, times, atol=1e-3)  # Matroska's clock has whole milliseconds


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "libvpx", "libvpx-vp9"])
def test_seeking_to_sparse_frames_gives_the_frames_of_a_whole_decode(codec, vision):
    options = dict(container="matroska", codec=codec, keyframe_every=7)
    data = video_file(moving(96), 8, **options)
    found = read_video(data, MediaConfig(video_fps=0.5, video_min_frames=2), vision, sound=False)
    assert found.grid[0] == 3
    frames = decoded(data)[np.linspace(0, 95, 6).round().astype(int)]
    expected = frames.reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(
        brightness(found), expected, atol=0.7
    )  # of resizing; a frame is 1.7 brighter than the last


def test_only_stretches_from_a_keyframe_to_a_sampled_frame_are_decoded(vision, decodings):
    data = video_file(moving(400), 10, keyframe_every=10, codec="mpeg4")
    found = read_video(data, MediaConfig(video_fps=0.1, video_min_frames=2), vision, sound=False)
    assert found.grid[0] == 2 and 4 <= len(decodings) <= 4 * 11


def test_varying_rates_have_the_times_of_their_frames(media, vision):
    times = [0.0, 0.1, 0.2, 0.3, 2.0, 2.1, 5.0, 7.5]
    data = video_file(moving(8), 10, "matroska", times=times)
    found = read_video(data, MediaConfig(video_fps=1.0), vision, sound=False)
    assert found.grid[0] == 4  # 8.57 seconds at the mean rate: all 8 frames
    np.testing.assert_allclose(found.seconds, [0.05, 0.25, 2.05, 6.25], atol=2e-3)
    assert found.seconds_per_grid == pytest.approx(2 * 7.5 / 7, abs=2e-3)


def test_a_part_has_its_own_frames_and_its_own_time(media, vision):
    data = video_file(moving(64), 8, sound=tone(8.0))
    part = read_video(data, media, vision, sound=True, start=2.0, end=6.0)
    assert part.grid[0] == 4 and len(part.waveform) == 64000
    indices = np.linspace(0, 31, 8).round()
    np.testing.assert_allclose(part.seconds, (indices / 8).reshape(4, 2).mean(axis=1), atol=1e-6)
    frames = decoded(data)[16 + indices.astype(int)]
    np.testing.assert_allclose(brightness(part), frames.reshape(4, -1).mean(axis=1), atol=0.7)
    with pytest.raises(SampleError, match="video_empty"):
        read_video(data, media, vision, sound=False, start=8.5)


def test_a_part_begins_with_the_frame_that_is_shown_by_then(vision):
    data = video_file(moving(4), 1, "matroska", times=[0.0, 4.0, 6.0, 9.0])
    whole = brightness(read_video(data, MediaConfig(), one_frame(vision), sound=False))
    for start, end, times, shown in [
        (5.0, None, [0.0, 1.0, 4.0], [1, 2, 3]),
        (4.5, 5.5, [0.0], [1]),
        (6.0, 9.0, [0.0], [2]),
        (3.9995, 7.0, [0.0005, 2.0005], [1, 2]),  # a start in seconds that were rounded
    ]:
        part = read_video(data, MediaConfig(), one_frame(vision), sound=False, start=start, end=end)
        np.testing.assert_allclose(part.seconds, times, atol=1e-6)
        np.testing.assert_allclose(brightness(part), whole[shown], atol=0.1)


def test_pixels_that_are_wider_than_high_are_shown_so(tmp_path, media, vision):
    file = tmp_path / "wide.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x96:r=4:d=1", "-vf", "setsar=3/2", "-pix_fmt", "yuv420p", file)
    found = read_video(file.read_bytes(), MediaConfig(video_min_pixels=64), vision, sound=False)
    assert found.grid[1:] == (6, 6)


def matrices() -> list[tuple[str, ...]]:
    """Options of ffmpeg for all eight orientations of a display matrix."""
    return [
        ("-display_rotation", str(angle), *mirror)
        for angle in (0, 90, 180, 270)
        for mirror in ((), ("-display_hflip",))
    ]


@pytest.mark.parametrize("matrix", matrices(), ids=" ".join)
def test_frames_are_turned_and_mirrored_as_ffmpeg_does(matrix, tmp_path, vision):
    upright, file = tmp_path / "upright.mp4", tmp_path / "turned.mp4"
    picture = np.random.default_rng(3).integers(0, 256, (1, 3, 2, 3), np.uint8).repeat(32, 1).repeat(32, 2)
    upright.write_bytes(video_file(picture, 8))
    ffmpeg(*matrix, "-i", upright, "-c", "copy", file)
    shown = ffmpeg("-i", file, "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    found = read_video(file.read_bytes(), MediaConfig(video_min_pixels=64), one_frame(vision), sound=False)
    height, width = 16 * found.grid[1], 16 * found.grid[2]
    expected, _ = patchify(np.frombuffer(shown, np.uint8).reshape(1, height, width, 3), one_frame(vision))
    assert np.abs(found.patches.astype(int) - expected).mean() < 3  # of the conversion to RGB


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_frames_are_turned_as_their_metadata_say(rotation, media, vision):
    corner = np.zeros((2, 64, 128, 3), np.uint8)
    corner[:, :32, :32] = 255  # top left
    found = read_video(video_file(corner, 8, rotation=rotation), media, vision, sound=False)
    blocks = found.patches.reshape(found.grid[1] // 2, found.grid[2] // 2, -1).mean(axis=2) > 128
    expected = {90: (3, 0), -90: (0, 1), 180: (1, 3)}[rotation]  # row and column; positive is counterclockwise
    assert found.grid[1:] == ((4, 8) if rotation == 180 else (8, 4))
    assert [tuple(at) for at in np.argwhere(blocks)] == [expected]


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_the_last_frame_is_repeated_to_fill_a_temporal_patch(frames, media, vision):
    found = read_video(video_file(moving(frames), 2), MediaConfig(video_fps=8.0), vision, sound=False)
    assert found.grid[0] == (frames + 1) // 2 and len(found.seconds) == found.grid[0]
    last = found.patches.reshape(found.grid[0], -1, 3, 2, 256)[-1]
    assert np.array_equal(last[:, :, 0], last[:, :, 1])
    assert found.seconds[-1] == pytest.approx((frames - 1) / 2)


class TestTokenBudget:
    def tokens(self, video) -> int:
        return int(np.prod(video.grid)) // 4

    def test_there_are_fewer_frames_first_and_then_smaller_ones(self, media, vision):
        data = video_file(moving(80, 256, 320), 8)
        whole = read_video(data, media, vision, sound=False)
        assert whole.grid == (10, 16, 20) and self.tokens(whole) == 800
        fewer = read_video(data, media, vision, sound=False, max_tokens=330)
        assert fewer.grid == (4, 16, 20)
        smaller = read_video(data, media, vision, sound=False, max_tokens=100)
        assert smaller.grid[0] == media.video_min_frames // 2 and 60 < self.tokens(smaller) <= 100

    @pytest.mark.parametrize("per_frame", [False, True])
    def test_it_holds_for_every_shape(self, per_frame, vision):
        rng = np.random.default_rng(2)
        media = MediaConfig(video_pixels_per_frame=per_frame, video_min_pixels=20_000, video_max_pixels=1_000_000)
        for _ in range(12):
            frames, height, width = int(rng.integers(1, 30)), *(2 * rng.integers(8, 80, 2))
            budget = int(rng.integers(20, 200))
            data = video_file(moving(frames, height, width), 8, codec="mpeg4")
            assert self.tokens(read_video(data, media, vision, sound=False, max_tokens=budget)) <= budget

    def test_a_budget_that_no_size_meets_is_refused(self, media, vision):
        with pytest.raises(SampleError, match="video_over_budget"):
            read_video(video_file(moving(8, 32, 1024), 8), media, vision, sound=False, max_tokens=1)


class TestSound:
    @pytest.mark.parametrize(
        ("container", "codec", "sound"), [("mp4", "libx264", "aac"), ("webm", "libvpx", "libopus")]
    )
    def test_it_begins_with_the_pictures(self, container, codec, sound, media, vision):
        samples = tone(2.0, 48000)
        samples[:48000] = 0
        data = video_file(moving(16), 8, container, codec, sound=samples, sound_rate=48000, sound_codec=sound)
        waveform = read_video(data, media, vision, sound=True).waveform
        assert abs(len(waveform) - 32000) < 1100
        assert abs(np.argmax(np.abs(waveform) > 0.2) - 16000) < 160

    def test_sound_that_begins_later_follows_silence(self, media, vision):
        data = video_file(moving(16), 8, "matroska", sound=tone(1.0, 48000), sound_rate=48000, sound_begins=0.75)
        waveform = read_video(data, media, vision, sound=True).waveform
        assert abs(len(waveform) - 28000) < 1100
        assert not waveform[:11500].any() and abs(np.argmax(np.abs(waveform) > 0.2) - 12000) < 500

    @pytest.mark.parametrize("heard", [True, False])
    def test_pictures_that_begin_later_keep_their_time(self, heard, vision):
        samples = tone(2.0, 48000)
        samples[:48000] = 0
        times = [0.5 + n / 8 for n in range(12)]
        data = video_file(moving(12), 8, "matroska", times=times, sound=samples, sound_rate=48000)
        found = read_video(data, MediaConfig(video_fps=8.0), one_frame(vision), sound=heard)
        np.testing.assert_allclose(found.seconds, times, atol=0.03)  # AAC begins 21 ms early
        if heard:
            assert abs(np.argmax(np.abs(found.waveform) > 0.2) - 16000) < 500

    def test_without_a_stream_of_sound_there_is_no_waveform(self, media, vision):
        assert read_video(video_file(moving(8), 8), media, vision, sound=True).waveform is None

    def test_it_is_left_unread_where_it_is_not_asked_for(self, media, vision):
        assert read_video(video_file(moving(8), 8, sound=tone(1.0)), media, vision, sound=False).waveform is None
