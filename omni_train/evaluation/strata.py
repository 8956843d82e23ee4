"""Scores of the quality of speech, which ``omni-train data strata`` writes beside every sample."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from omni_train.data.rows.codes import MAX_SECONDS
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.strata import Speech, score
from omni_train.errors import UserError
from omni_train.evaluation import speech_measures
from omni_train.frozen.recognizer import SAMPLING_RATE, open_transcriber
from omni_train.recipe.schema import DataConfig
from omni_train.rollout.scoring import Tally
from omni_train.rollout.scoring import score as score_answer


class QualityJudge:
    """Scores of a sample's speech, named as in :class:`omni_train.recipe.schema.QualityConfig`.

    Args:
        tokenizer: folder of the tokenizer; None leaves `seconds_per_token` unmeasured.
        recognizer: checkpoint of network=recognizer, or a run; None measures no `error_rate`.

    Raises:
        UserError: a package is missing, or there is no recognizer in the checkpoint, or no tokenizer for it.
    """

    def __init__(self, tokenizer: Path | None, recognizer: str | None) -> None:
        speech_measures.require_packages(["dnsmos"])
        if recognizer is not None and tokenizer is None:
            raise UserError("recognizer= needs the tokenizer that it was trained with, in the folder `tokenizer`")
        self.tokenizer = None if tokenizer is None else Tokenizer(tokenizer)
        self.recognizer = None if recognizer is None else open_transcriber(recognizer, str(tokenizer))
        self.settings = {"recognizer": None if self.recognizer is None else self.recognizer.content_hash}

    def __call__(self, speech: Speech) -> dict[str, float | str]:
        """See :class:`omni_train.data_pipelines.strata.Judge`."""
        waveform, rate = speech.waveform, speech.sampling_rate
        seconds, quality = len(waveform) / rate, speech_measures.dnsmos(waveform, rate)
        found: dict[str, float | str | None] = {
            "snr_db": speech_measures.snr_db(waveform, rate),
            "dnsmos": None if quality is None else quality.ovrl,
            "clipping": speech_measures.clipping(waveform),
            "silence": speech_measures.silence(waveform, rate),
            "seconds": seconds,
            "seconds_per_token": self._seconds_per_token(seconds, speech.text),
        }
        if self.recognizer is not None:
            found["error_rate"] = self._error_rate(speech)
        return {name: "silent_or_too_short" if score is None else score for name, score in found.items()}

    def _seconds_per_token(self, seconds: float, text: str | None) -> float | str:
        if self.tokenizer is None:
            return "no_tokenizer"
        tokens = len(self.tokenizer.encode(text)) if text else 0
        return seconds / tokens if tokens else "no_text"

    def _error_rate(self, speech: Speech) -> float | str:
        """Word errors per word of the text; of characters where words are not spaced, or the language is not known."""
        assert self.recognizer is not None and self.tokenizer is not None
        if not speech.text:
            return "no_text"
        heard = soxr.resample(speech.waveform, speech.sampling_rate, SAMPLING_RATE).astype(np.float32, copy=False)
        (transcript,) = self.recognizer.transcribe([heard])
        return error_rate(speech.text, transcript, speech.meta)


def error_rate(text: str, transcript: str, meta: Mapping[str, Any]) -> float | str:
    """Error rate of a transcript, of words or else of characters; ``no_words`` where the text has none."""
    tally = Tally()
    score_answer(tally, dict(meta) | {"task": "transcribe"}, text, transcript)
    for kind in ("wer", "cer"):
        if (found := tally.pooled(kind)) is not None:
            return found
    return "no_words"


def write_strata(
    data: Path,
    out: Path | None = None,
    recognizer: str | None = None,
    workers: int = 0,
    max_seconds: float = MAX_SECONDS,
    max_sample_bytes: int = DataConfig.max_sample_bytes,
    max_text_bytes: int = DataConfig.max_text_bytes,
) -> None:
    """Copy the shards of a folder, with scores of every sample's speech in its ``meta.quality``.

    The scores are those that ``data.strata`` of a recipe knows: snr_db, dnsmos, clipping, silence, seconds,
    seconds_per_token and, with a recognizer, error_rate. All other files stay as they are, and codes stay valid. The
    same folder gives the same shards, whatever the number of processes. Stopped at any moment, the same command goes on
    where it was. ``strata.md`` tells the percentiles of each score and what could not be measured.

    Args:
        data: folder of indexed shards; it stays as it is. Tokens are counted by its folder `tokenizer`.
        out: folder of the new shards; data with `_strata` after its name.
        recognizer: checkpoint directory of a recognizer that was trained with that tokenizer, or a run directory.
        workers: processes that work side by side; 0 for one per core.
        max_seconds: longer speech is kept without scores (`audio_too_long`).
        max_sample_bytes: samples of more bytes are left out, as `data.max_sample_bytes` refuses them.
        max_text_bytes: samples whose ``key.json`` has more bytes are left out, as `data.max_text_bytes` refuses them.

    Raises:
        UserError: no shards, no recognizer, a package is missing, or `out` holds something else.
    """
    tokenizer = data / "tokenizer"
    judge = partial(QualityJudge, tokenizer if tokenizer.is_dir() else None, recognizer)
    score(data, judge, out, workers, max_seconds, max_sample_bytes, max_text_bytes)
