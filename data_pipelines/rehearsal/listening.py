"""Samples that are listened to: speech to write down, and spoken questions to answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_train.data_pipelines.rehearsal import phrases
from omni_train.data_pipelines.rehearsal.phrases import LANGUAGES
from omni_train.data_pipelines.rehearsal.speech import RATE, draw_voice, flac, say
from omni_train.data_pipelines.rehearsal.world import Sample, World, attach, conversation

COMBINED = ("digits", "name", "motion")  # said in so many ways that sentences are held out, and not voices alone
QUESTIONS = list(phrases.questions())


def speech(world: World) -> Sample:
    """A few words in one of six languages, and their transcript."""
    code, words = draw_utterance(world)
    wave, meta = speak(world, code, words)
    media: dict[str, bytes] = {}
    given = [attach(media, "audio", "flac", flac(wave)), LANGUAGES[code].write_down]
    return conversation((given, words), **meta, task="transcribe"), media


def audio_question(world: World) -> Sample:
    """A spoken question with an answer in text; ``twin`` is the name of the question, which a chat has too."""
    name, code, words, answer = draw_question(world)
    wave, meta = speak(world, code, words)
    media: dict[str, bytes] = {}
    given = [attach(media, "audio", "flac", flac(wave))]
    return conversation((given, answer), **meta, task="answer", twin=name, transcript=words), media


def draw_utterance(world: World, code: str | None = None, combined: bool = False) -> tuple[str, str]:
    """A language, ``code`` if that is given, and words of the world's split.

    Single words and commands are in both splits; with ``combined`` there are none.
    """
    while True:
        drawn, kind, words = phrases.utterance(world, code)
        if world.admits((drawn, words)) if kind in COMBINED else not combined:
            return drawn, words


def draw_question(world: World) -> phrases.Question:
    """A question of the world's split."""
    while not asks(world, question := world.choice(QUESTIONS)):
        pass
    return question


def asks(world: World, question: phrases.Question) -> bool:
    """Whether a question belongs to the world's split; those about a single digit are in both."""
    return "larger" not in question.name or world.admits((question.name,))


def speak(world: World, code: str, words: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Words in a voice of the world's split: (n,) float32 at 16 kHz, and the meta that says so."""
    voice = draw_voice(world)
    wave = say(words, LANGUAGES[code].voice, voice)
    return wave, dict(language=code, source="espeak-ng", voice=str(voice), duration=len(wave) / RATE)
