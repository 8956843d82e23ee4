"""Patches of images and video frames, as the processors of Qwen3-VL, Qwen3.5 and Qwen3-Omni make them.

Axis letters: N frames, H and W pixels of a frame, C channels, P patches, D values of a patch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import interpolate

from omni_train.recipe.schema import VisionEncoderConfig

EXTREME_RATIO = 200  # of one side to the other


def image_size(height: int, width: int, *, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Size (height, width) that an image is resized to: multiples of ``factor``, shape kept, pixels within bounds.

    The rule is that of ``transformers``' ``Qwen2VLImageProcessor``.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    return _within_bounds(1, 1, height, width, factor, min_pixels, max_pixels)


def video_size(
    frames: int, height: int, width: int, *, temporal: int, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """Size (height, width) that a video's frames are resized to; the bounds are of all ``frames`` together.

    ``temporal`` is the number of frames in a patch. The rule is that of ``transformers``' ``Qwen3VLVideoProcessor``.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    return _within_bounds(frames, round(frames / temporal) * temporal, height, width, factor, min_pixels, max_pixels)


def _within_bounds(frames, whole_frames, height, width, factor, min_pixels, max_pixels) -> tuple[int, int]:
    if max(height, width) > EXTREME_RATIO * min(height, width):
        raise ValueError(f"{width} x {height} pixels: one side is more than {EXTREME_RATIO} times the other")
    rows, columns = round(height / factor), round(width / factor)
    pixels = whole_frames * rows * columns * factor**2
    if pixels > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def resize(frame_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized frame (H, W, C) uint8, bicubic with antialiasing, to the very bytes that ``torchvision`` gives."""
    if frame_HWC.shape[:2] == (height, width):
        return frame_HWC
    frame_1CHW = torch.from_numpy(frame_HWC).permute(2, 0, 1)[None]
    resized_1CHW = interpolate(frame_1CHW, size=(height, width), mode="bicubic", antialias=True)
    return resized_1CHW[0].permute(1, 2, 0).numpy()


def patchify(frames_NHWC: np.ndarray, vision: VisionEncoderConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Patches (P, D) uint8 of an image (N = 1) or of a video's frames, and their grid (t, h, w).

    The last frame is repeated to fill a temporal patch; height and width are multiples of a merged patch. Patches are
    ordered by time, then in blocks of merge x merge that become one token; a patch is (channel, frame, y, x).
    """
    frames, height, width, channels = frames_NHWC.shape
    patch, temporal, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    missing = -frames % temporal
    if missing:
        frames_NHWC = np.concatenate([frames_NHWC, frames_NHWC[-1:].repeat(missing, axis=0)])
    t, h, w = (frames + missing) // temporal, height // patch, width // patch
    blocks = frames_NHWC.reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, channels)
    patches = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return patches.reshape(t * h * w, channels * temporal * patch * patch), (t, h, w)
