"""Evaluation of the Talker in the loop: held-out texts are spoken, measured, and kept to listen to."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import torch

from omni_train import platform
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.spoken_prompts import SpokenPrompt
from omni_train.data.samples.lengths import codec_sampling_rate
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.evaluation.base import Cell, Evaluated, Medium
from omni_train.evaluation.exhibits import keep_sounds
from omni_train.evaluation.resynthesis import Transcribe, at_16_khz
from omni_train.evaluation.voices import Voices
from omni_train.models.talker import Talker
from omni_train.platform.logs import warn
from omni_train.platform.signals import cut_short
from omni_train.recipe.schema import Recipe, SpeechScheduleConfig
from omni_train.rollout.sampling import Sampling
from omni_train.rollout.scoring import Tally, score
from omni_train.rollout.speech import GREEDY, Prompt, Speaker, Speech, SpeechLimits, SpeechSampling

BATCH = 64
"""Texts that are spoken at a time."""
LONGEST = 4.0
"""Length at which speech is ended, relative to what is expected of its text: a Talker that has not learned to end."""
ENDINGS = ("eos", "limit", "stuck")
LENGTHS = {"below_1s": 1.0, "below_2s": 2.0, "below_5s": 5.0, "below_15s": 15.0, "from_15s": math.inf}
"""Classes of recordings by their length, which end before so many seconds."""
CLOSE = 0.25
"""Largest difference from the recording's length, relative to it, that counts as close."""


class Thinks(Protocol):
    """The frozen Thinker, as speech that is generated asks it."""

    def states_of(self, sequence: TokenSequence, positions: np.ndarray) -> torch.Tensor:
        """States (K, H) at positions (K,) of one sequence."""
        ...


@dataclass
class SpokenText:
    """A held-out text as it was recorded, as the codec makes the recording's codes sound, and as the Talker says it."""

    name: str
    text: str
    schedule: str
    original: Path  # WAV
    resynthesis: Path  # WAV
    speech: Path  # WAV
    spectrograms: Path  # PNG, the three beside each other
    table = "speech"

    def line(self) -> str:
        """See :class:`Exhibit`."""
        return f"{self.name}  {self.text!r} -> {self.speech}"

    def cells(self) -> dict[str, Cell]:
        """See :class:`Exhibit`: the three sounds and the spectrograms of all."""
        files = {"original": "audio", "resynthesis": "audio", "speech": "audio", "spectrograms": "image"}
        media = {name: Medium(kind, getattr(self, name).name, getattr(self, name)) for name, kind in files.items()}
        return {"name": self.name, "schedule": self.schedule, "text": self.text, **media}


class SpokenTexts:
    """Evaluation that speaks the recipe's held-out texts, the same ones every time and with the same random numbers.

    Args:
        recipe: its ``evaluation`` says how they are spoken; ``print_samples`` of them are kept.
        prompts: held-out texts of this data rank.
        refused: how many samples could not be read, by reason.
        decode: function from codes (Q, M) to a waveform (n,) float32 at the codec's sampling rate.
        transcribe: a recognizer, for word error rates.
        thinker: the Thinker below, where the prompts have no stored states.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: list[SpokenPrompt],
        refused: Counter[str],
        decode: Callable[[np.ndarray], np.ndarray],
        transcribe: Transcribe | None = None,
        thinker: Thinks | None = None,
    ) -> None:
        self.config, self.switch_label, self.seed = recipe.evaluation, recipe.data.speech.switch_label, recipe.seed
        self.schedules = self.config.speech_schedules or recipe.data.speech.schedules[:1]
        self.rate, self.tokenizer = codec_sampling_rate(recipe.model), Tokenizer(recipe.data.tokenizer)
        self.directory = Path(recipe.runs_dir, recipe.run, "report")
        self.prompts, self.refused, self.decode, self.transcribe = prompts, refused, decode, transcribe
        self.thinker, self.voices = thinker, Voices(self.rate)
        self._of_recordings: tuple[Tally, list[np.ndarray]] | None = None

    @torch.no_grad()
    def __call__(self, model: Talker) -> Evaluated:
        """Speak and measure all texts. Collective.

        Args:
            model: the whole Talker, unwrapped. Left in the mode it was in.

        Returns:
            metrics over the texts of all ranks, ``eval_…``: of ``spoken`` texts, the fractions ``ended_eos``,
            ``ended_limit`` and ``ended_stuck``; ``length_ratio``, the mean of the speech's length over the
            recording's, and ``length_within_25``, the fraction that differs by at most 25 %;
            ``tokens_before_sound`` and ``positions_before_sound``, means of the text tokens and of the stream's
            positions before the first frame; with a recognizer ``speech_wer``, ``speech_wer_LANGUAGE``,
            ``speech_wer_below_2s`` (of recordings from 1 to 2 s) and the like, the same of characters (``cer``), and
            all of them of the recordings (``original``) and of what the codec makes of their codes
            (``resynthesis``); and as :class:`Voices` says. Where there are several schedules, what is measured of
            speech ends in the schedule's name. Exhibits are this rank's kept texts, of the first rank alone. Nothing
            where a signal cut it short.
        """
        ratio = self.config.speech_frames_per_token or self._frames_per_token()
        several = len(self.schedules) > 1
        by_schedule = {f"_{one.name}" if several else "": one for one in self.schedules}
        training = model.training
        model.eval()
        try:
            spoken = {suffix: self._speak(model, schedule, ratio) for suffix, schedule in by_schedule.items()}
        finally:
            model.train(training)
        self.voices.hear(self.prompts, self._decode)
        if self._of_recordings is None and not cut_short():
            self._of_recordings = self._measure_recordings()
        sounds = {suffix: [self._decode(one.frames()) for one in found] for suffix, found in spoken.items()}
        tally = Tally.of_refused(self.refused)
        tally.add("spoken", len(self.prompts))
        for suffix, found in spoken.items():
            tally += _named(self._measure(found, sounds[suffix]), suffix)
        if cut_short(torch.distributed.group.WORLD):
            return Evaluated()
        assert self._of_recordings is not None  # as no signal came
        of_recordings, resyntheses = self._of_recordings
        tally += of_recordings
        everywhere = Tally()
        for part in platform.parallel.gather_over_data_ranks(tally):
            everywhere += part
        kept: list[SpokenText] = []
        if platform.rank() == 0:
            try:
                for suffix, waveforms in sounds.items():
                    kept += self._keep(waveforms, resyntheses, suffix)
            except (OSError, soundfile.LibsndfileError) as error:
                warn(f"{self.directory}: the speech cannot be written: {error}")
        return Evaluated({f"eval_{name}": value for name, value in everywhere.metrics().items()}, kept)

    def _frames_per_token(self) -> float:
        """Frames of a text token in the held-out recordings of all ranks. Collective."""
        mine = (sum(prompt.frames for prompt in self.prompts), sum(len(prompt.tokens) for prompt in self.prompts))
        frames, tokens = map(sum, zip(*platform.parallel.gather_over_data_ranks(mine), strict=True))
        return frames / tokens if tokens else 1.0

    def _speak(self, model: Talker, schedule: SpeechScheduleConfig, ratio: float) -> list[Speech]:
        """Speech of each prompt; unfinished where a signal cut it short."""
        temperature = self.config.speech_temperature
        sampling = SpeechSampling(Sampling(temperature, top_k=50), seed=self.seed) if temperature else GREEDY
        # Texts of like lengths share a batch, which goes on until the last has ended.
        order = sorted(range(len(self.prompts)), key=lambda index: len(self.prompts[index].tokens))
        speech = [Speech() for _ in self.prompts]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            if cut_short(model.tp_group):
                break
            speaker = Speaker(
                model,
                self.tokenizer,
                [self._prompt(self.prompts[index]) for index in chosen],
                schedule=schedule,
                switch_label=self.switch_label,
                frames_per_token=ratio,
                sampling=sampling,
                limits=SpeechLimits(frames_per_token=LONGEST * ratio),
            )
            while speaker.growing and not cut_short(model.tp_group):
                speaker.step()
            for index, found in zip(chosen, speaker.speech, strict=True):
                speech[index] = found
        return speech

    def _prompt(self, prompt: SpokenPrompt) -> Prompt:
        states = None if prompt.states is None else torch.from_numpy(prompt.states)
        if prompt.thinker is not None and len(prompt.positions):
            assert self.thinker is not None  # as validation has seen
            states = self.thinker.states_of(prompt.thinker, prompt.positions)
        number = zlib.crc32(prompt.name.encode())  # the same whatever rank speaks it, and beside whatever else
        return Prompt(prompt.plan, prompt.rotary_ids, states, prompt.tokens, number=number)

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        """Waveform (n,) of codes (Q, M); nothing of no frames, and where a signal cuts it short."""
        return np.zeros(0, np.float32) if cut_short() or not codes.size else self.decode(codes)

    def _measure_recordings(self) -> tuple[Tally, list[np.ndarray]]:
        """What is measured of recordings and of their codes, which does not change as the Talker learns."""
        tally, resyntheses = Tally(), [self._decode(prompt.codes) for prompt in self.prompts]
        originals = [prompt.waveform for prompt in self.prompts]
        for name, waveforms in (("original", originals), ("resynthesis", resyntheses)):
            self._recognize(tally, name, waveforms)
        for waveform in originals:
            self.voices.add_pauses(tally, waveform, "original_")
        self.voices.add_similarity(tally, self.prompts, originals, "original_")
        return tally, resyntheses[: self.config.print_samples]

    def _measure(self, found: Sequence[Speech], sounds: Sequence[np.ndarray]) -> Tally:
        tally = Tally()
        for prompt, speech in zip(self.prompts, found, strict=True):
            for ending in ENDINGS:
                tally.add(f"ended_{ending}", speech.ending == ending, 1)
            ratio = len(speech.codes) / prompt.frames
            tally.add("length_ratio", ratio, 1)
            tally.add("length_within_25", abs(ratio - 1) <= CLOSE, 1)
            if speech.before is not None:
                for what, number in zip(("tokens", "positions"), speech.before, strict=True):
                    tally.add(f"{what}_before_sound", number, 1)
        self._recognize(tally, "speech", sounds)
        for waveform in sounds:
            self.voices.add_pauses(tally, waveform)
        self.voices.add_similarity(tally, self.prompts, sounds)
        return tally

    def _recognize(self, tally: Tally, name: str, waveforms: Sequence[np.ndarray]) -> None:
        """Count the recognizer's errors: by language, by length of the recording, and of all."""
        if self.transcribe is None or not waveforms or cut_short():
            return
        transcripts = self.transcribe([at_16_khz(waveform, self.rate) for waveform in waveforms])
        for prompt, transcript in zip(self.prompts, transcripts, strict=True):
            errors, seconds = Tally(), len(prompt.waveform) / self.rate
            score(errors, prompt.meta | {"task": "transcribe"}, prompt.text, transcript, self.config.normalizer)
            length = next(length for length, end in LENGTHS.items() if seconds < end)
            for metric in errors.weights:
                kind = metric.partition("_")[0]
                for key in (metric, kind, f"{kind}_{length}"):
                    tally.add(f"{name}_{key}", errors.sums[metric], errors.weights[metric])
            if name == "original" and errors.sums["unknown_language"]:
                tally.add("unknown_language", 1)

    def _keep(self, sounds: list[np.ndarray], resyntheses: list[np.ndarray], suffix: str) -> list[SpokenText]:
        """Write the first texts as WAV and PNG files."""
        kept = []
        for number, (prompt, resynthesis, speech) in enumerate(zip(self.prompts, resyntheses, sounds, strict=False)):
            waveforms = {"original": prompt.waveform, "resynthesis": resynthesis, "speech": speech}
            files = keep_sounds(self.directory, f"{number:02d}", waveforms, self.rate, suffix)
            kept.append(SpokenText(prompt.name, prompt.text, suffix.removeprefix("_"), **files))
        return kept


def _named(tally: Tally, suffix: str) -> Tally:
    """The same tally with names that end in `suffix`."""
    both = (Counter({f"{name}{suffix}": value for name, value in one.items()}) for one in (tally.sums, tally.weights))
    return Tally(*both)
