"""Samples that speak: texts that are read out, and conversations whose last answer is spoken."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_train.data_pipelines.rehearsal import listening, seeing
from omni_train.data_pipelines.rehearsal.phrases import LANGUAGES
from omni_train.data_pipelines.rehearsal.speech import RATE, Voice, draw_voice, flac, say
from omni_train.data_pipelines.rehearsal.world import Sample, World, attach, conversation

PAUSE = 0.35  # seconds between the sentences of a long text, about what espeak-ng makes of a full stop


def spoken(world: World) -> Sample:
    """A text that is read out, or a conversation with a spoken answer.

    Who speaks is told by a name, by an utterance of other words and, in half of the samples, in words.
    """
    return world.choices((_text, _chat), (3, 2))[0](world)


def spoken_long(world: World) -> Sample:
    """Many sentences, one after the other in one voice for 30 to 60 seconds."""
    code, voice, length = world.choice(world.languages), draw_voice(world), world.uniform(31, 55)
    language, sentences, waves = LANGUAGES[code], [], []
    while sum(map(len, waves)) < length * RATE:
        sentences.append(listening.draw_utterance(world, code)[1])
        wave = say(language.sentences(sentences[-1:]), language.voice, voice)
        waves += [wave, np.zeros(round(PAUSE * RATE), np.float32)]
    text = language.sentences(sentences)
    media: dict[str, bytes] = {}
    fields, meta = _speech(world, media, code, text, np.concatenate(waves[:-1]), voice)
    return {"text": text, "meta": meta | {"task": "read"}, **fields}, media


def _text(world: World) -> Sample:
    """Up to four phrases, as one sentence or several, or words in any order."""
    code, voice = world.choice(world.languages), draw_voice(world)
    in_order = world.random() < 0.5
    text = draw_text(world, code, world.choices((1, 2, 3, 4), (1, 2, 2, 1))[0]) if in_order else draw_words(world, code)
    media: dict[str, bytes] = {}
    fields, meta = _speech(world, media, code, text, say(text, LANGUAGES[code].voice, voice), voice)
    return {"text": text, "meta": meta | {"task": "read"}, **fields}, media


def _chat(world: World) -> Sample:
    """What is said is asked for in writing, or heard, or seen, in the first turn or the second."""
    code, voice = world.choice(world.languages), draw_voice(world)
    media: dict[str, bytes] = {}
    tasks = [world.choice(list(ASKED)) for _ in range(world.choice((1, 1, 1, 2)))]
    turns = [ASKED[task](world, code, media) for task in tasks]
    answer = turns[-1][1]
    fields, meta = _speech(world, media, code, answer, say(answer, LANGUAGES[code].voice, voice), voice)
    return conversation(*turns, **meta, task=tasks[-1]) | fields, media


def _speech(
    world: World, media: dict[str, bytes], code: str, text: str, wave: np.ndarray, voice: Voice
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put the ``wave`` of a text and a reference utterance among the ``media``; returns the fields that name them and
    the meta."""
    _, reference = listening.draw_utterance(world, code, combined=True)
    while reference in text:
        _, reference = listening.draw_utterance(world, code, combined=True)
    meta = dict(language=code, source="espeak-ng", voice=str(voice), reference=reference, duration=len(wave) / RATE)
    speech = attach(media, "audio", "flac", flac(wave))["audio"]
    utterance = attach(media, "audio", "flac", flac(say(reference, LANGUAGES[code].voice, voice)))["audio"]
    described = {"description": voice.description} if world.random() < 0.5 else {}
    return {"speech": speech, "voice": {"speech": utterance, "name": voice.name, **described}}, meta


def draw_text(world: World, code: str, phrases: int) -> str:
    """Phrases of the world's split, with commas between or as sentences; single words alone are in both splits."""
    language = LANGUAGES[code]
    while True:
        drawn = [listening.draw_utterance(world, code)[1] for _ in range(phrases)]
        text = language.comma.join(drawn) if world.random() < 0.5 else language.sentences(drawn)
        if phrases == 1 or world.admits((code, text), *((code, phrase) for phrase in drawn)):
            return text


def draw_words(world: World, code: str) -> str:
    """Two to seven of the language's units in any order, of the world's split.

    Phrases of a small grammar are learned by heart, with the pairs of words that were held out taken for others that
    were not; where anything may follow anything, each word has to be heard and said by itself.
    """
    language = LANGUAGES[code]
    while True:
        text = language.separator.join(world.choices(language.units(), k=world.randint(2, 7)))
        if world.admits((code, text)):
            return text


def _say(world: World, code: str, media: dict[str, bytes]) -> tuple[list[Any], str]:
    _, words = listening.draw_utterance(world, code, combined=True)
    return [LANGUAGES[code].say.format(text=words)], words


def _repeat(world: World, code: str, media: dict[str, bytes]) -> tuple[list[Any], str]:
    _, words = listening.draw_utterance(world, code, combined=True)
    wave, _ = listening.speak(world, code, words)
    return [attach(media, "audio", "flac", flac(wave)), LANGUAGES[code].repeat], words


def _see(world: World, code: str, media: dict[str, bytes]) -> tuple[list[Any], str]:
    scene, words = draw_sight(world, code)
    return [seeing.attach_picture(world, media, seeing.show(world, scene)), LANGUAGES[code].see], words


def draw_sight(world: World, code: str) -> tuple[seeing.Scene, str]:
    """A scene of one large shape, and what the shape is called, both of the world's split."""
    while True:
        scene = seeing.draw_scene(world, "large")
        words = LANGUAGES[code].name(scene.color, scene.shape)
        if world.admits((code, words)):
            return scene, words


ASKED = {"say": _say, "repeat": _repeat, "see": _see}
"""What asks for a spoken answer, by its task: function that gives what the user gives, and the answer."""
