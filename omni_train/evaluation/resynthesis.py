"""Evaluation of the codec in the loop: held-out speech is resynthesized, measured, and kept to listen to."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from omni_train import platform
from omni_train.data.rows.utterances import Utterance
from omni_train.data.samples.lengths import codec_sampling_rate
from omni_train.evaluation.base import Cell, Evaluated, Medium
from omni_train.evaluation.exhibits import keep_sounds
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec, usage_of
from omni_train.objectives.semantic import TEACHER_SAMPLING_RATE
from omni_train.objectives.spectral import MelDistance
from omni_train.platform.logs import warn
from omni_train.platform.signals import cut_short
from omni_train.recipe.schema import Recipe, required
from omni_train.rollout.scoring import Tally, score

Transcribe = Callable[[list[np.ndarray]], list[str]]
"""Function from waveforms (n,) float32 at 16 kHz to their transcripts."""


@dataclass
class Resynthesis:
    """A held-out utterance and its resynthesis, as files."""

    name: str
    text: str | None  # the transcript
    original: Path  # WAV
    resynthesis: Path  # WAV
    spectrograms: Path  # PNG, the two beside each other
    table = "resyntheses"

    def line(self) -> str:
        """See :class:`Exhibit`."""
        return f"{self.name}  {self.text!r} -> {self.resynthesis}"

    def cells(self) -> dict[str, Cell]:
        """See :class:`Exhibit`: original, resynthesis and the spectrograms of both."""
        files = {"original": "audio", "resynthesis": "audio", "spectrograms": "image"}
        media = {name: Medium(kind, getattr(self, name).name, getattr(self, name)) for name, kind in files.items()}
        return {"name": self.name, "text": self.text, **media}


class Resyntheses:
    """Evaluation that resynthesizes the recipe's held-out utterances, the same ones every time.

    Args:
        recipe: its ``evaluation.print_samples`` is how many resyntheses are kept.
        utterances: held-out utterances of this data rank.
        refused: how many utterances could not be read, by reason.
        directory: directory of the run; resyntheses are kept in its ``report``.
        transcribe: a recognizer, for word error rates of originals and resyntheses.
    """

    def __init__(
        self,
        recipe: Recipe,
        utterances: list[Utterance],
        refused: Counter[str],
        directory: Path,
        transcribe: Transcribe | None = None,
    ) -> None:
        self.rate = codec_sampling_rate(recipe.model)
        code2wav = required(recipe.model.code2wav)
        self.codebooks = (code2wav.num_quantizers, code2wav.codebook_size)
        training = recipe.codec_training
        self.mel = MelDistance(training.mel_windows, training.mel_bins, self.rate, training.mel_floor)
        self.normalizer = recipe.evaluation.normalizer
        self.kept, self.directory, self.transcribe = recipe.evaluation.print_samples, directory / "report", transcribe
        self.utterances, self.refused = utterances, refused

    @torch.no_grad()
    def __call__(self, codec: SpeechCodec | Code2Wav) -> Evaluated:
        """Resynthesize and measure all utterances. Collective.

        Args:
            codec: whole and unwrapped, in evaluation mode; a Code2Wav synthesizes the codes in the shards.

        Returns:
            metrics over the utterances of all ranks: ``eval_mel_distance`` as in training, ``eval_stoi``, ``eval_pesq``
            (wide band), ``eval_stoi_failed`` and ``eval_pesq_failed`` of the ``eval_utterances``, which are too short
            or too quiet for the two; of each codebook ``eval_codebook_used_…``, the fraction of its codewords in use,
            with ``eval_codebook_used_least`` of all, and ``eval_codebook_perplexity_…``; and with a recognizer
            ``eval_original_wer_LANGUAGE`` and ``eval_resynthesis_wer_LANGUAGE``, the same of characters (``cer``), and
            both of all languages together, and ``eval_unknown_language``, how many texts are of no known language.
            Exhibits are the kept resyntheses of the first rank, none elsewhere. Nothing where a signal cut it short.
        """
        device = next(codec.parameters()).device
        tally, counts_NK = Tally.of_refused(self.refused), torch.zeros(self.codebooks)
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for utterance in self.utterances:
            if cut_short():
                break
            codes_NT, resynthesis = _resynthesize(codec, utterance, device)
            counts_NK.scatter_add_(1, codes_NT, torch.ones_like(codes_NT, dtype=counts_NK.dtype))
            pairs.append((utterance.waveform[: len(resynthesis)], resynthesis))
            self._measure(tally, *pairs[-1])
        if self.transcribe is not None and not cut_short():
            self._recognize(tally, pairs)
        everywhere, everywhere_NK = Tally(), torch.zeros_like(counts_NK)
        for part, part_NK in platform.parallel.gather_over_data_ranks((tally, counts_NK)):
            everywhere += part
            everywhere_NK += part_NK
        if cut_short():
            return Evaluated()
        metrics = everywhere.metrics() | _usage(everywhere_NK)
        kept: list[Resynthesis] = []
        if platform.rank() == 0:
            try:
                kept = self._keep(pairs)
            except (OSError, soundfile.LibsndfileError) as error:
                warn(f"{self.directory}: the resyntheses cannot be written: {error}")
        return Evaluated({f"eval_{name}": value for name, value in metrics.items()}, kept)

    def _measure(self, tally: Tally, original: np.ndarray, resynthesis: np.ndarray) -> None:
        tally.add("utterances", 1)
        one, other = (torch.from_numpy(waveform)[None] for waveform in (original, resynthesis))
        tally.add("mel_distance", float(self.mel(other, one, torch.tensor([len(original)]))[0]), 1)
        for name, measured in (("stoi", stoi), ("pesq", pesq)):
            value = measured(original, resynthesis, self.rate)
            tally.add(name, *((value, 1) if value is not None else (0, 0)))
            tally.add(f"{name}_failed", value is None)

    def _recognize(self, tally: Tally, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Count the recognizer's errors on originals and resyntheses whose transcript is known."""
        assert self.transcribe is not None  # as the caller has seen
        both = zip(pairs, self.utterances, strict=True)
        told = [(pair, utterance.meta, utterance.text) for pair, utterance in both if utterance.text]
        for side, name in enumerate(("original", "resynthesis")):
            errors = Tally()
            transcripts = self.transcribe([at_16_khz(pair[side], self.rate) for pair, _, _ in told]) if told else []
            for (_, meta, spoken), text in zip(told, transcripts, strict=True):
                score(errors, meta | {"task": "transcribe"}, spoken, text, self.normalizer)
            for metric in errors.weights:
                tally.add(f"{name}_{metric}", errors.sums[metric], errors.weights[metric])
                tally.add(f"{name}_{metric.partition('_')[0]}", errors.sums[metric], errors.weights[metric])
        if unknown := errors.sums["unknown_language"]:
            tally.add("unknown_language", unknown)

    def _keep(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[Resynthesis]:
        """Write the first pairs as WAV and PNG files."""
        kept = []
        for number, (utterance, pair) in enumerate(zip(self.utterances[: self.kept], pairs, strict=False)):
            sounds = dict(zip(("original", "resynthesis"), pair, strict=True))
            files = keep_sounds(self.directory, f"{number:02d}", sounds, self.rate)
            kept.append(Resynthesis(utterance.name, utterance.text, **files))
        return kept


def _resynthesize(
    codec: SpeechCodec | Code2Wav, utterance: Utterance, device: torch.device
) -> tuple[torch.Tensor, np.ndarray]:
    """Codes (N, T) of an utterance, and the waveform (n,) synthesized from them, not longer than the original."""
    if isinstance(codec, Code2Wav):
        codes_1NT = torch.from_numpy(utterance.codes)[None].to(device)
        resynthesis_1S = codec(codes_1NT)
    else:
        waveform_1S = torch.from_numpy(utterance.waveform)[None]
        codes_1NT = codec.encode(waveform_1S.to(device, codec.bridge.weight.dtype))
        resynthesis_1S = codec.decode(codes_1NT)
    return codes_1NT[0].cpu(), resynthesis_1S[0, : len(utterance.waveform)].float().cpu().numpy()


def _usage(counts_NK: torch.Tensor) -> dict[str, float]:
    used_N, perplexity_N = (values.tolist() for values in usage_of(counts_NK))
    metrics = {f"codebook_used_{number:02d}": value for number, value in enumerate(used_N)}
    metrics |= {f"codebook_perplexity_{number:02d}": value for number, value in enumerate(perplexity_N)}
    return metrics | {"codebook_used_least": min(used_N)}


def stoi(original: np.ndarray, resynthesis: np.ndarray, sampling_rate: int) -> float | None:
    """Short-time objective intelligibility (Taal et al. 2011), up to 1; None where less than 0.4 s is not silent."""
    from pystoi import stoi as measure

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns where it can only return 1e-5
        try:
            value = float(measure(original, resynthesis, sampling_rate))
        except (RuntimeWarning, ValueError):
            return None
    return value if np.isfinite(value) else None


def pesq(original: np.ndarray, resynthesis: np.ndarray, sampling_rate: int) -> float | None:
    """Perceptual evaluation of speech quality, wide band (ITU-T P.862.2), 1 to 4.6; None where it finds no speech."""
    try:
        from pesq import PesqError
        from pesq import pesq as measure
    except ImportError:
        _warn_that_pesq_is_missing()
        return None
    try:
        value = float(measure(16000, at_16_khz(original, sampling_rate), at_16_khz(resynthesis, sampling_rate), "wb"))
    except (PesqError, ValueError):
        return None
    return value if np.isfinite(value) else None


@cache
def _warn_that_pesq_is_missing() -> None:
    warn("the package pesq is not installed: PESQ is not measured, and counted as failed; install the extra [pesq]")


def at_16_khz(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Waveform (n,) resampled to 16 kHz."""
    return soxr.resample(waveform, sampling_rate, TEACHER_SAMPLING_RATE)
