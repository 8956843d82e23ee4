"""Sizes and patches against transformers' image and video processors."""

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from omni_train.data.samples.features.patches import image_size, patchify, resize, video_size
from omni_train.recipe.schema import VisionEncoderConfig

VISION = VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8)
HALF = dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)  # as in the released processors


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def as_model_input(patches: np.ndarray) -> np.ndarray:
    return patches / np.float32(127.5) - 1


@pytest.mark.parametrize(
    ("height", "width"), [(37, 53), (481, 301), (31, 777), (9, 1700), (1, 1), (64, 96), (999, 1001)]
)
def test_images_equal_the_processor_of_qwen3_5(height, width):
    image = pixels(height, width, 3)
    bounds = dict(min_pixels=65536, max_pixels=300_000)
    processor = Qwen2VLImageProcessor(size=dict(shortest_edge=65536, longest_edge=300_000), **HALF)
    expected = processor(images=[image], return_tensors="np", input_data_format="channels_last")
    patches, grid = patchify(resize(image, *image_size(height, width, factor=32, **bounds))[None], VISION)
    assert grid == tuple(expected["image_grid_thw"][0]) and patches.dtype == np.uint8
    np.testing.assert_allclose(as_model_input(patches), expected["pixel_values"], atol=1e-6)


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 37, 53), (3, 481, 301), (5, 20, 111), (7, 333, 777)])
def test_videos_equal_the_processor_of_qwen3_vl(frames, height, width):
    video = pixels(frames, height, width, 3)
    size = dict(shortest_edge=30_000, longest_edge=600_000)
    processor = Qwen3VLVideoProcessor(size=size, do_sample_frames=False, cap_pixels_per_frame=False)
    expected = processor(videos=[torch.from_numpy(video).permute(0, 3, 1, 2)], return_tensors="np")
    chosen = video_size(frames, height, width, temporal=2, factor=32, min_pixels=30_000, max_pixels=600_000)
    patches, grid = patchify(np.stack([resize(frame, *chosen) for frame in video]), VISION)
    assert grid == tuple(expected["video_grid_thw"][0])
    np.testing.assert_allclose(as_model_input(patches), expected["pixel_values_videos"], atol=1e-6)


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 137, 153), (3, 481, 301)])
def test_frames_bounded_by_themselves_equal_the_video_processor_of_qwen3_omni(frames, height, width):
    video = pixels(frames, height, width, 3)
    size = dict(shortest_edge=30_000, longest_edge=90_000)
    processor = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, **HALF)
    expected = processor(videos=[torch.from_numpy(video).permute(0, 3, 1, 2)], return_tensors="np")
    chosen = image_size(height, width, factor=32, min_pixels=30_000, max_pixels=90_000)
    patches, grid = patchify(np.stack([resize(frame, *chosen) for frame in video]), VISION)
    assert grid == tuple(expected["video_grid_thw"][0])
    np.testing.assert_allclose(as_model_input(patches), expected["pixel_values_videos"], atol=1e-6)


def test_two_hundred_random_sizes_have_the_processors_numbers_of_patches():
    rng = np.random.default_rng(11)
    images = Qwen2VLImageProcessor(size=dict(shortest_edge=65536, longest_edge=16777216), **HALF)
    videos = Qwen3VLVideoProcessor(size=dict(shortest_edge=4096, longest_edge=25165824), cap_pixels_per_frame=False)
    for _ in range(200):
        frames, (height, width) = int(rng.integers(2, 700)), (int(n) for n in np.exp(rng.uniform(3, 8, 2)))
        h, w = image_size(height, width, factor=32, min_pixels=65536, max_pixels=16777216)
        assert h * w // 256 == images.get_number_of_image_patches(height, width)
        h, w = video_size(frames, height, width, temporal=2, factor=32, min_pixels=4096, max_pixels=25165824)
        assert (frames + 1) // 2 * h * w // 256 == videos.get_num_of_video_patches(frames, height, width)


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match="more than 200 times"):
        image_size(1, 201, factor=32, min_pixels=65536, max_pixels=16777216)
