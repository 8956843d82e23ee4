"""Samples that are watched: shapes that move, appear and change color, silent or with sounds, and when they do."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_train.data_pipelines.rehearsal.film import Film, mp4
from omni_train.data_pipelines.rehearsal.listening import speak
from omni_train.data_pipelines.rehearsal.phrases import COLORS, DIRECTIONS, LANGUAGES, SHAPES
from omni_train.data_pipelines.rehearsal.pictures import BACKGROUNDS, Figure, shade
from omni_train.data_pipelines.rehearsal.seeing import draw_look, thing
from omni_train.data_pipelines.rehearsal.speech import beep, track
from omni_train.data_pipelines.rehearsal.world import Sample, World, attach, conversation, seconds

SIDES = range(56, 80, 2)  # pixels: 4 tokens a frame pair where patches are 16 pixels and 2 x 2 of them are merged
STEP = 0.5  # seconds between moments at which something can happen
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def video(world: World) -> Sample:
    """A silent video of a few seconds: a shape moves, appears, or changes its color."""
    return world.choice((moving, appearing, changing))(world)


def moving(world: World) -> Sample:
    """One shape crosses the picture."""
    color, shape, background, direction = draw_event(world, DIRECTIONS)
    size, duration, radius = draw_size(world), world.randint(4, 6) * STEP, 0.2
    x, y = STEPS[direction]
    rgb, side = shade(color, world), min(size)
    drift = world.uniform(-0.15, 0.15)

    def figures(time: float) -> list[Figure]:
        way = 0.56 * (time / duration - 0.5)
        center = (0.5 + x * way + abs(y) * drift, 0.5 + y * way + abs(x) * drift)
        return [Figure(shape, rgb, center[0] * size[0], center[1] * size[1], radius * side)]

    task, question, answer = world.choice(
        (
            ("caption", "Describe the video.", f"{thing(color, shape)} moves {direction}"),
            ("direction", "Which way does it move?", direction),
            ("color", "What color is the shape?", color),
        )
    )
    film = Film(size, shade(background, world), figures, duration, fps=8)
    return asked(world, film, [question], answer, task=task, color=color, shape=shape, direction=direction)


def appearing(world: World) -> Sample:
    """One shape is there, another one comes."""
    color, shape, background, _ = draw_event(world, ("appears",))
    there = draw_look(world)
    size, duration = draw_size(world), world.randint(4, 6) * STEP
    time = draw_time(world, duration)
    first = Figure(there[1], shade(there[0], world), 0.25 * size[0], 0.3 * size[1], 0.19 * min(size))
    second = Figure(shape, shade(color, world), 0.7 * size[0], 0.7 * size[1], 0.23 * min(size))
    task, question, answer = world.choice(
        (
            ("when", "When does the second shape appear?", seconds(time)),
            ("when", "When does the second shape appear?", seconds(time)),
            ("caption", "What appears?", thing(color, shape)),
        )
    )
    film = Film(
        size, shade(background, world), lambda now: [first, second] if now >= time else [first], duration, fps=8
    )
    return asked(world, film, [question], answer, task=task, color=color, shape=shape, seconds=time)


def changing(world: World) -> Sample:
    """One shape changes its color."""
    before, after, shape, film, time = draw_change(world)
    task, question, answer = world.choice(
        (
            ("when", "When does the color change?", seconds(time)),
            ("color", "What color is it at first?", before),
            ("color", "What color is it at the end?", after),
        )
    )
    return asked(world, film, [question], answer, task=task, color=before, to=after, shape=shape, seconds=time)


def video_audio(world: World) -> Sample:
    """A video with a sound track: a shape changes its color, and a beep or a word is heard."""
    before, after, shape, film, change = draw_change(world)
    while (time := draw_time(world, film.duration - STEP)) == change:  # early enough for a word to be heard out
        pass
    color = before if time < change else after
    meta = dict(color=color, shape=shape, seconds=time)
    if world.random() < 0.5:
        sound = beep(world.choice((440, 660, 880)))
        task, question, answer = world.choice(
            (
                ("when", "When is the beep?", seconds(time)),
                ("color", "What color is the shape at the beep?", color),
            )
        )
    else:
        code = world.choice(list(LANGUAGES))
        words = world.choice(LANGUAGES[code].digits)
        sound, spoken = speak(world, code, words)
        meta |= dict(voice=spoken["voice"])
        task, question, answer = world.choice(
            (
                ("transcribe", LANGUAGES[code].write_down, words),
                ("when", "When is something said?", seconds(time)),
                ("color", "What color is the shape when something is said?", color),
            )
        )
        meta |= dict(language=code) if task == "transcribe" else {}
    return asked(world, film, [question], answer, {time: sound}, task=task, **meta)


def asked(
    world: World,
    film: Film,
    question: list[str],
    answer: str,
    sounds: dict[float, np.ndarray] | None = None,
    **meta: Any,
) -> Sample:
    """A conversation about a film, with a sound track where there are ``sounds`` by their times."""
    media: dict[str, bytes] = {}
    given = [attach_film(world, media, film, sounds), *question]
    meta = dict(language="en", source="rendered", duration=film.duration) | meta
    return conversation((given, answer), **meta), media


def attach_film(
    world: World, media: dict[str, bytes], film: Film, sounds: dict[float, np.ndarray] | None
) -> dict[str, Any]:
    """Encode a film; one in ten without ``sounds`` has a track that is not for hearing."""
    unheard = {0.0: beep(550)} if world.random() < 0.1 else None
    heard = sounds if sounds is not None else unheard
    wave = None if heard is None else track(film.duration, heard)
    codec = world.choices(("libx264", "mpeg4"), (3, 1))[0]
    return attach(media, "video", "mp4", mp4(film, codec, wave), sound=sounds is not None)


def draw_change(world: World) -> tuple[str, str, str, Film, float]:
    """Two colors of the world's split, a shape, its film, and when the color changes."""
    before, shape, background, after = draw_event(world, COLORS)
    size, duration = draw_size(world), world.randint(4, 6) * STEP
    time = draw_time(world, duration)
    x, y = (world.uniform(0.38, 0.62) * side for side in size)
    looks = [Figure(shape, shade(color, world), x, y, 0.32 * min(size)) for color in (before, after)]
    film = Film(size, shade(background, world), lambda now: [looks[now >= time]], duration, fps=8)
    return before, after, shape, film, time


def draw_event(world: World, events: tuple[str, ...]) -> tuple[str, str, str, str]:
    """A color, a shape, a background, and an event, in a combination of the world's split."""
    while True:
        drawn = (world.choice(COLORS), world.choice(SHAPES), world.choice(list(BACKGROUNDS)), world.choice(events))
        if drawn[0] != drawn[3] and world.admits(drawn):
            return drawn


def draw_size(world: World) -> tuple[int, int]:
    return world.choice(SIDES), world.choice(SIDES)


def draw_time(world: World, duration: float) -> float:
    """A moment after the beginning and before ``duration``."""
    return world.randint(1, round(duration / STEP) - 1) * STEP
