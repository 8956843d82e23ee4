"""Long samples: minutes of speech and most of a minute of video, with a question about one moment of it."""

from __future__ import annotations

import math

from omni_train.data_pipelines.rehearsal import listening
from omni_train.data_pipelines.rehearsal.film import Film
from omni_train.data_pipelines.rehearsal.phrases import LANGUAGES
from omni_train.data_pipelines.rehearsal.pictures import Figure, shade
from omni_train.data_pipelines.rehearsal.seeing import draw_look, thing
from omni_train.data_pipelines.rehearsal.speech import RATE, beep, flac, track
from omni_train.data_pipelines.rehearsal.watching import STEP, asked, draw_event, draw_size
from omni_train.data_pipelines.rehearsal.world import Sample, World, attach, conversation, seconds

MINUTES = (0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1.5, 1.5, 2, 10)
PAUSE = 0.6  # seconds, at least, before everything that is said


def long_audio(world: World) -> Sample:
    """Minutes of words and sentences in many voices and languages, and a beep before one of them.

    Asked is when the beep is, what is said after it, or, of a short stretch that is read alone, what is said there.
    """
    length = world.choice(MINUTES) * 60
    sounds, said, time = {}, [], 0.0
    while time < length:
        start = math.ceil(10 * (time + PAUSE)) / 10
        code, words = listening.draw_utterance(world)
        sounds[start], _ = listening.speak(world, code, words)
        time = start + len(sounds[start]) / RATE
        said.append((start, time, code, words))
    start, end, code, words = world.choice(said[len(said) // 10 :])
    moment = round(start - 0.5, 1)
    sounds[moment] = beep(1000)
    wave = track(time + PAUSE, sounds)
    media: dict[str, bytes] = {}
    part = attach(media, "audio", "flac", flac(wave))
    meta = dict(language="en", source="espeak-ng", duration=len(wave) / RATE)
    task = world.choice(("when", "answer", "transcribe"))
    if task == "when":
        return conversation(([part, "When is the beep?"], seconds(moment)), **meta, task=task, seconds=moment), media
    meta |= dict(language=code, task=task)
    if task == "answer":
        return conversation(([part, "What is said after the beep?"], words), **meta), media
    part |= dict(start=round(start - 0.1, 1), end=round(end + 0.1, 1))
    return conversation(([part, LANGUAGES[code].write_down], words), **meta), media


def long_video(world: World) -> Sample:
    """Shapes that are shown one after the other for 20 to 60 seconds; half of the films say a digit with each."""
    color, shape, background, _ = draw_event(world, ("is shown",))
    looks, count = [(color, shape)], world.randint(6, 10)
    while len(looks) < count:
        if (look := draw_look(world)) not in looks:
            looks.append(look)
    world.shuffle(looks)
    lengths = [world.randint(6, 12) * STEP for _ in looks]
    starts = [sum(lengths[:number], 0.0) for number in range(len(looks))]
    size = draw_size(world)
    shown = [
        [Figure(shape, shade(color, world), 0.5 * size[0], 0.5 * size[1], 0.3 * min(size))] for color, shape in looks
    ]
    film = Film(
        size,
        shade(background, world),
        lambda time: shown[sum(start <= time for start in starts) - 1],
        sum(lengths),
        fps=4,
    )
    asked_for = looks.index((color, shape))
    meta = dict(color=color, shape=shape)
    sounds = None
    choices = [("when", f"When does {thing(color, shape)} appear?", seconds(starts[asked_for]))]
    if asked_for + 1 < len(looks):
        choices += [("answer", f"What comes after {thing(color, shape)}?", thing(*looks[asked_for + 1]))]
    if world.random() < 0.5:
        digits = [world.randrange(10) for _ in looks]
        words = [LANGUAGES["en"].digits[digit] for digit in digits]
        sounds = {start: listening.speak(world, "en", word)[0] for start, word in zip(starts, words, strict=True)}
        choices += [("transcribe", f"What is said when {thing(color, shape)} appears?", words[asked_for])]
    task, question, answer = world.choice(choices)
    if task == "when":
        meta |= dict(seconds=starts[asked_for])
    return asked(world, film, [question], answer, sounds, task=task, **meta)
