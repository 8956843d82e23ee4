"""Anti-aliased pictures of colored shapes and of small text."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 220, 50),
    "purple": (140, 50, 165),
    "orange": (245, 140, 30),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (20, 20, 20), "pink": (250, 195, 205)}
FINE = 4  # pixels drawn for each one kept, each way


@dataclass(frozen=True)
class Figure:
    """A shape on a picture: its center and radius in pixels, its angle in degrees."""

    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    angle: float = 0.0


def shade(name: str, random: Random) -> tuple[int, int, int]:
    """A color or background as it happens to be on one picture."""
    rgb = (COLORS | BACKGROUNDS)[name]
    return tuple(min(255, max(0, value + random.randint(-9, 9))) for value in rgb)


def paint(size: tuple[int, int], background: tuple[int, int, int], figures: list[Figure]) -> Image.Image:
    """A picture of ``size`` (width, height) with its figures."""
    image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), background)
    draw = ImageDraw.Draw(image)
    for figure in figures:
        x, y, radius = figure.x * FINE, figure.y * FINE, figure.radius * FINE
        if figure.shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=figure.rgb)
        else:
            corners = [
                (x + radius * r * math.cos(turn), y + radius * r * math.sin(turn))
                for degrees, r in _CORNERS[figure.shape]
                if (turn := math.radians(degrees + figure.angle)) is not None
            ]
            draw.polygon(corners, fill=figure.rgb)
    return image.reduce(FINE)


_CORNERS = {  # degrees clockwise from the right, and distance from the center
    "square": [(45 + 90 * n, 1.15) for n in range(4)],
    "triangle": [(-90 + 120 * n, 1.2) for n in range(3)],
    "star": [(-90 + 36 * n, 1.2 if n % 2 == 0 else 0.5) for n in range(10)],
    "cross": [(90 * n + turn, r) for n in range(4) for turn, r in ((-17, 1.15), (17, 1.15), (45, 0.45))],
}


def write(image: Image.Image, text: str, rgb: tuple[int, int, int], height: int) -> None:
    """Write ``text`` of a ``height`` in pixels into the middle of ``image``, in the font that Pillow carries."""
    font = ImageFont.load_default(height)
    ImageDraw.Draw(image).text((image.width / 2, image.height / 2), text, rgb, font, anchor="mm")


def encode(image: Image.Image, extension: str, random: Random) -> bytes:
    """A file (jpg, png or webp) of the picture with a little noise."""
    noise = np.random.default_rng(random.getrandbits(64)).normal(0, 3, (image.height, image.width, 3))
    noisy = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    noisy.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], quality=88)
    return file.getvalue()
