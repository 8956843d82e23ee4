"""Samples that are looked at: pictures to describe, and questions about color, shape, number and text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from PIL import Image

from omni_train.data_pipelines.rehearsal.phrases import COLORS, SHAPES
from omni_train.data_pipelines.rehearsal.pictures import BACKGROUNDS, Figure, encode, paint, shade, write
from omni_train.data_pipelines.rehearsal.world import Sample, World, attach, conversation

NUMBERS = ("no", "one", "two", "three", "four")
WORDS = "ant bat bus cat cow cup dog egg fox hat jam key map owl pen pig sun toy van zoo".upper().split()
QUESTIONS = {
    "caption": ("Describe the picture.", "What is in the picture?"),
    "color": ("What color is the shape?", "Which color do you see?"),
    "shape": ("What shape is it?", "Which shape do you see?"),
    "count": ("How many shapes are there?", "Count the shapes."),
    "read": ("What does it say?", "Read the text."),
}
# Pixels of a side: 4 tokens, or 4 to 9, where patches are 16 pixels and 2 x 2 of them are merged.
SIDES, LONGER_SIDES = (60, 78), (60, 108)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: figures at ``places``, in fractions of the room for them from left and top."""

    color: str
    shape: str
    background: str
    places: tuple[tuple[float, float], ...]
    large: bool
    beside: tuple[str, str] | None = None  # color and shape of a second one, to the right of the first

    @property
    def caption(self) -> str:
        if self.beside:
            return f"{thing(self.color, self.shape)} left of {thing(*self.beside)} on {self.background}"
        if len(self.places) > 1:
            return f"{NUMBERS[len(self.places)]} {self.color} {plural(self.shape)} on {self.background}"
        return f"a {'large' if self.large else 'small'} {self.color} {self.shape} on {self.background}"

    def figures(self, world: World, width: int, height: int) -> list[Figure]:
        """The figures on a picture of that size, a little off their places."""
        radius = min(width, height) * (world.uniform(0.36, 0.40) if self.large else world.uniform(0.19, 0.22))
        looks = (
            [(self.color, self.shape), self.beside] if self.beside else [(self.color, self.shape)] * len(self.places)
        )
        figures = []
        for (color, shape), place in zip(looks, self.places, strict=True):
            x, y = (
                1.2 * radius + (size - 2.4 * radius) * min(1, max(0, fraction + world.uniform(-0.1, 0.1)))
                for fraction, size in zip(place, (width, height), strict=True)
            )
            figures.append(Figure(shape, shade(color, world), x, y, radius, world.uniform(-10, 10)))
        return figures


def image(world: World) -> Sample:
    """A picture and its caption."""
    return asked(world, "caption", draw_scene(world, world.choice(("large", "large", "small", "several", "two"))))


def image_question(world: World) -> Sample:
    """A picture and a question with an answer of one word."""
    task = world.choices(("color", "shape", "count", "read"), (2, 5, 3, 2))[0]
    if task == "read":
        return reading(world)
    kinds = {"color": ("large", "several"), "shape": ("large",), "count": ("small", "several", "several", "several")}[
        task
    ]
    return asked(world, task, draw_scene(world, world.choice(kinds)))


def asked(world: World, task: str, scene: Scene) -> Sample:
    """A picture of ``scene`` with a question of a ``task`` of QUESTIONS but ``read``."""
    media: dict[str, bytes] = {}
    given = [attach_picture(world, media, show(world, scene)), world.choice(QUESTIONS[task])]
    return conversation((given, answer(scene, task)), **describe(scene), task=task), media


def answer(scene: Scene, task: str) -> str:
    return {"caption": scene.caption, "color": scene.color, "shape": scene.shape, "count": str(len(scene.places))}[task]


def describe(scene: Scene) -> dict[str, Any]:
    """What the meta of a sample tells about its picture."""
    return dict(language="en", source="rendered", color=scene.color, shape=scene.shape, background=scene.background)


def draw_scene(world: World, kind: str) -> Scene:
    """A scene of the world's split, of one ``large`` or ``small`` shape, ``several`` alike, or ``two`` that differ."""
    while True:
        look, other, background = draw_look(world), draw_look(world), world.choice(list(BACKGROUNDS))
        if kind == "two":
            scene = Scene(*look, background, ((0, 0.5), (1, 0.5)), large=False, beside=other)
        elif kind == "several":
            corners = [(x, y) for x in (0, 1) for y in (0, 1)]
            scene = Scene(*look, background, tuple(world.sample(corners, world.randint(2, 4))), large=False)
        else:
            place = (world.choice((0.2, 0.5, 0.8)), world.choice((0.2, 0.5, 0.8)))
            scene = Scene(*look, background, (place,), large=kind == "large")
        if world.admits(dataclasses.astuple(scene)) and look != other:
            return scene


def draw_look(world: World) -> tuple[str, str]:
    return world.choice(COLORS), world.choice(SHAPES)


def show(world: World, scene: Scene) -> Image.Image:
    sides = SIDES if scene.large else LONGER_SIDES
    width, height = world.randint(*sides), world.randint(*sides)
    return paint((width, height), shade(scene.background, world), scene.figures(world, width, height))


def attach_picture(world: World, media: dict[str, bytes], picture: Image.Image) -> dict[str, Any]:
    extension = world.choices(("jpg", "png", "webp"), (16, 1, 3))[0]
    return attach(media, "image", extension, encode(picture, extension, world))


def reading(world: World) -> Sample:
    """A picture of a number or a word to read."""
    while True:
        text = str(world.randint(10, 99)) if world.random() < 0.6 else world.choice(WORDS)
        color, background = world.choice(("blue", "red", "purple")), world.choice(("white", "gray", "pink"))
        if world.admits((text, color, background)):
            break
    width, height = world.randint(*SIDES), world.randint(*SIDES)
    picture = paint((width, height), shade(background, world), [])
    height_of_text = world.uniform(0.5, 0.6) if text.isdigit() else world.uniform(0.36, 0.42)
    write(picture, text, shade(color, world), round(height_of_text * min(width, height)))
    media: dict[str, bytes] = {}
    given = [attach_picture(world, media, picture), world.choice(QUESTIONS["read"])]
    meta = dict(language="en", task="read", source="rendered", color=color, background=background)
    return conversation((given, text), **meta), media


def thing(color: str, shape: str) -> str:
    return f"{'an' if color == 'orange' else 'a'} {color} {shape}"


def plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"
