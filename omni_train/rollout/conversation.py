"""An answer that is written and spoken at the same time: the Thinker's text, the Talker's frames, Code2Wav's sound.

The Talker goes first: whenever it can take a step it does, and text is written only while it waits for some. So the
first frame follows the first piece of text that a schedule asks for, sound is there as early as it can be, and no step
of the Talker waits for text that it does not need. Text that comes after speech has ended is written all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from omni_train.rollout.speech import Speaker
from omni_train.rollout.waveform import WaveStream


@dataclass
class Event:
    """What has just come: a piece of text, or a piece of sound.

    Attributes:
        seconds: since the start.
        text: tokens.
        waveform: (S,) float32 samples.
    """

    seconds: float
    text: Sequence[int] = ()
    waveform: np.ndarray | None = None


class SpokenAnswer:
    """One answer as a stream of events.

    Args:
        text: the tokens of the answer in pieces, which are asked for as late as possible.
        speaker: function that begins to speak a text of one sequence, of which these tokens have come and more may.
        waves: what makes sound of frames.
        sampling_rate: samples a second.

    Attributes:
        speaker: the speaker, once there is text; None of an empty one, of which nothing is spoken.
        frames: that were spoken so far.
        samples: of the sound so far.
        first_packet: seconds from the start to the first sound; None while there is none.
        seconds: from the start to the last sound.
    """

    def __init__(
        self,
        text: Iterable[Sequence[int]],
        speaker: Callable[[Sequence[int]], Speaker],
        waves: WaveStream,
        sampling_rate: int,
    ) -> None:
        self._text, self._begin, self._waves = text, speaker, waves
        self.sampling_rate = sampling_rate
        self.speaker: Speaker | None = None
        self.first_packet: float | None = None
        self.frames, self.samples, self.seconds = 0, 0, 0.0

    def __iter__(self) -> Iterator[Event]:
        """Events as they come, to the end of both text and speech."""
        start = perf_counter()
        for tokens in self._text:
            yield Event(perf_counter() - start, tokens)
            if self.speaker is None:
                self.speaker = self._begin(tokens)
            else:
                self.speaker.feed(0, tokens)
            yield from self._speak(self.speaker, start)
        if self.speaker is not None:
            self.speaker.feed(0, [], ended=True)
            yield from self._speak(self.speaker, start)

    @property
    def ending(self) -> str:
        """How speech has ended: as :class:`omni_train.rollout.speech.Speech`, or ``no text``."""
        return "no text" if self.speaker is None else str(self.speaker.speech[0].ending)

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for each second of sound."""
        return self.seconds * self.sampling_rate / max(self.samples, 1)

    def _speak(self, speaker: Speaker, start: float) -> Iterator[Event]:
        """Sound of all steps that the speaker can take with the text that it has."""
        speech = speaker.speech[0]
        while speech.ending is None:
            if not speaker.step():
                return
            waveforms = [self._waves.add(codes) for codes in speech.codes[self.frames :]]
            self.frames += len(waveforms)
            if speech.ending is not None:
                waveforms.append(self._waves.end())
            for waveform in filter(len, waveforms):
                self.samples += len(waveform)
                self.seconds = perf_counter() - start
                if self.first_packet is None:
                    self.first_packet = self.seconds
                yield Event(self.seconds, waveform=waveform)
