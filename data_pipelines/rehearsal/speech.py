"""Speech by espeak-ng, through its C interface (speak_lib.h), and sound files."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import io
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from omni_train.data_pipelines.rehearsal.world import World

RATE = 16000  # Hz, of everything written
VOLUME = 0.1  # of full scale: what is quieter takes fewer bits
SEED = 20250923

VARIANTS = ("", "+m3", "+m7", "+f2", "+f4")  # of every language's voice: a man by default
PITCHES = (35, 45, 55, 65)  # of 100
SPEEDS = (150, 170, 190)  # words a minute
SPEAKERS = ("a man", "another man", "a third man", "a woman", "another woman")  # of VARIANTS, in words

_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _CHARACTER = 2, 0x8000, 1, 1
_SPEED, _PITCH = 1, 3
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """Who speaks, in any language."""

    variant: str
    pitch: int
    speed: int

    def __str__(self) -> str:
        return f"{self.variant or '+m0'} pitch {self.pitch} speed {self.speed}"

    @property
    def name(self) -> str:
        """The speaker alone, whatever the pitch and speed: ``f2``."""
        return self.variant[1:] or "m0"

    @property
    def description(self) -> str:
        """The voice in words: ``a woman, high and fast``."""
        speaker = SPEAKERS[VARIANTS.index(self.variant)]
        pitch = ("very low", "low", "high", "very high")[PITCHES.index(self.pitch)]
        return f"{speaker}, {pitch} and {('slow', 'steady', 'fast')[SPEEDS.index(self.speed)]}"


def draw_voice(world: World) -> Voice:
    """A voice of the world's split."""
    while True:
        voice = Voice(world.choice(VARIANTS), world.choice(PITCHES), world.choice(SPEEDS))
        if world.admits(dataclasses.astuple(voice)):
            return voice


def say(text: str, language: str, voice: Voice) -> np.ndarray:
    """Speak ``text`` with espeak-ng's voice of a ``language``: (n,) float32 at 16 kHz, silence trimmed at both ends.

    The noise and the phases inside espeak-ng go on from one utterance to the next, so only the same utterances in the
    same order from the start of a process give the same samples.
    """
    library, rate, heard = _espeak()
    heard.clear()
    if library.espeak_SetVoiceByName(f"{language}{voice.variant}".encode()):
        raise ValueError(f"espeak-ng has no voice {language}{voice.variant}")
    library.espeak_SetParameter(_SPEED, voice.speed, 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)
    encoded = text.encode() + b"\0"
    library.espeak_Synth(encoded, len(encoded), 0, _CHARACTER, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    wave = soxr.resample(np.concatenate(heard).astype(np.float32) / 32768, rate, RATE)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    margin = RATE // 50
    return VOLUME * wave[max(loud[0] - margin, 0) : loud[-1] + margin]


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int, list[np.ndarray]]:
    """The library, its sampling rate, and the list that its callback fills."""
    import espeakng_loader  # the only package that the rehearsal needs beyond what training does

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Synth.argtypes = (
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    )
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), _DO_NOT_EXIT)
    if rate <= 0:
        raise OSError("espeak-ng does not start; is espeakng-loader installed for this platform?")
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    heard: list[np.ndarray] = []

    @_Callback
    def hear(samples, count, _events):
        if samples and count:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(hear)
    library.hear = hear  # the library must not outlive its callback
    return library, rate, heard


def flac(wave: np.ndarray) -> bytes:
    """(n,) float32 at 16 kHz as a FLAC file of 16 bits."""
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def beep(frequency: float, duration: float = 0.3) -> np.ndarray:
    """A tone in Hz of some seconds, (n,) float32, faded in and out."""
    time = np.arange(round(duration * RATE)) / RATE
    fade = np.minimum(1, np.minimum(time, duration - time) / 0.01)
    return (VOLUME * fade * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def track(duration: float, sounds: dict[float, np.ndarray]) -> np.ndarray:
    """A sound track of some seconds, (n,) float32 at 16 kHz: each of the ``sounds`` begins at its time."""
    wave = np.zeros(round(duration * RATE), dtype=np.float32)
    for time, sound in sounds.items():
        start = round(time * RATE)
        wave[start : start + len(sound)] += sound[: len(wave) - start]
    return wave
