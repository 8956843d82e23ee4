"""Whose voice is heard in generated speech, and how it pauses, by models of packages that may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from omni_train import platform
from omni_train.data.rows.spoken_prompts import SpokenPrompt
from omni_train.errors import UserError
from omni_train.evaluation.speech_measures import SHORTEST_SECONDS, pauses, require_packages, speaker_embedding
from omni_train.platform.logs import warn
from omni_train.rollout.scoring import Tally


class Voices:
    """Measures of the voices of an evaluation. What a package is missing for is not measured, which is said once.

    ``pauses`` and ``longest_pause`` are means of the number of pauses and of the seconds of the longest; ``similarity``
    is the mean of the speech's to the reference utterance's resynthesis, for the samples that have a reference;
    ``right_voice`` the fraction that is more similar to it than, on the mean, to the references of another
    ``meta.voice``. A single reference of one of many voices that are near each other would tell less: of the
    rehearsal's own recordings, an eighth is nearer to its reference than to all 300 others.

    Args:
        sampling_rate: of all waveforms, in Hz.
    """

    def __init__(self, sampling_rate: int) -> None:
        self.rate = sampling_rate
        self.pausing, self.telling = _available("pauses"), _available("speaker_similarity")
        self._references: dict[str, np.ndarray | None] | None = None
        self._everywhere: list[tuple[object, np.ndarray]] = []

    def hear(self, prompts: Sequence[SpokenPrompt], decode: Callable[[np.ndarray], np.ndarray]) -> None:
        """Hear the reference utterances of this rank's prompts, and learn those of all ranks. Collective.

        Args:
            prompts: of this data rank, the same at every call.
            decode: function from codes (Q, frames) to a waveform (n,).
        """
        if not self.telling or self._references is not None:
            return
        self._references = {
            prompt.name: speaker_embedding(decode(prompt.reference), self.rate)
            for prompt in prompts
            if prompt.reference is not None
        }
        voices = {prompt.name: prompt.meta.get("voice") for prompt in prompts}
        mine = [(voices[name], one) for name, one in self._references.items() if one is not None]
        self._everywhere = [pair for part in platform.parallel.gather_over_data_ranks(mine) for pair in part]

    def add_pauses(self, tally: Tally, waveform: np.ndarray, side: str = "") -> None:
        """Add the pauses of a waveform; one in which no speech is found has none to count."""
        if not self.pausing or len(waveform) < SHORTEST_SECONDS * self.rate:
            return
        if (found := pauses(waveform, self.rate)) is not None:
            tally.add(f"{side}pauses", found.number, 1)
            tally.add(f"{side}longest_pause", found.longest, 1)

    def add_similarity(
        self, tally: Tally, prompts: Sequence[SpokenPrompt], sounds: Sequence[np.ndarray], side: str = ""
    ) -> None:
        """Add the similarity of each prompt's sound (n,) to its reference utterance, after :meth:`hear`."""
        for prompt, sound in zip(prompts, sounds, strict=True):
            reference = (self._references or {}).get(prompt.name)
            if reference is None:
                continue
            spoken = speaker_embedding(sound, self.rate)
            if spoken is not None:
                tally.add(f"{side}similarity", float(spoken @ reference), 1)
            voice = prompt.meta.get("voice")
            others = [one for other, one in self._everywhere if other != voice]
            if voice is not None and others:  # of speech without a voice, the right one is not heard
                right = spoken is not None and spoken @ reference > np.mean([spoken @ other for other in others])
                tally.add(f"{side}right_voice", right, 1)


def _available(measure: str) -> bool:
    try:
        require_packages([measure])
    except UserError as error:
        warn(f"not measured of speech: {error}")
        return False
    return True
