"""Measures of one utterance of speech: noise, quality, clipping, silence, pauses, and whose voice it is.

Waveforms are (n,) float32 with full scale at 1, at any sampling rate. A measure is None where it has no value. Models
come inside packages of the extra [speech]; each is loaded once in a process and computes on one core.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
import torch
from scipy import special

from omni_train.errors import UserError

RATE = 16000
"""Sampling rate in Hz of the models."""
SHORTEST_SECONDS = 0.1
"""Length in seconds below which noise, quality and voice are not measured."""
FRAME_SECONDS = 0.02
FULL_SCALE = 0.999
"""Absolute value of a sample that counts as full scale: codecs and dither leave it just below 1."""
PACKAGES = {
    "dnsmos": ("speechmos", "librosa", "onnxruntime"),
    "pauses": ("silero_vad", "onnxruntime"),
    "speaker_similarity": ("resemblyzer", "webrtcvad", "librosa"),
}
"""Packages that a measure needs beyond those of training."""

_SNR_DB = np.arange(-20.0, 101.0, 2.0)
_SPEECH_SHAPE = 0.4  # of the Gamma distribution of clean speech's amplitudes: Kim and Stern 2008, section 2


class Pauses(NamedTuple):
    """Pauses between the first and the last word of an utterance."""

    number: int
    longest: float  # seconds; 0 without any


class DNSMOS(NamedTuple):
    """Mean opinion scores, 1 to 5, as the model predicts them (ITU-T P.835)."""

    ovrl: float  # of the whole
    sig: float  # of the speech
    bak: float  # of the background


def require_packages(measures: Iterable[str]) -> None:
    """Refuse measures whose packages are not installed.

    Args:
        measures: names of functions of this module.

    Raises:
        UserError: the first package that is missing, in one line.
    """
    for measure in measures:
        for package in PACKAGES.get(measure, ()):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"{measure} needs the package {package.replace('_', '-')}; install the extra [speech] "
                    "(pip install 'omni_train[speech]', then pip install --no-deps resemblyzer)"
                )


def snr_db(waveform: np.ndarray, sampling_rate: int) -> float | None:
    """Signal-to-noise ratio in dB, from -20 to 100, by WADA (Kim and Stern, "Robust signal-to-noise ratio estimation
    based on waveform amplitude distribution analysis", Interspeech 2008).

    It takes amplitudes of clean speech for Gamma-distributed and noise for Gaussian; LibriTTS was filtered by it. Above
    some 40 dB it tells clean from cleaner only roughly. Samples that are exactly 0 were put there, not recorded, and
    are left out.

    Returns:
        None where less than SHORTEST_SECONDS is not 0.
    """
    amplitudes = np.abs(waveform[waveform != 0]).astype(np.float64)
    if len(amplitudes) < SHORTEST_SECONDS * sampling_rate:
        return None
    return float(np.interp(np.log(amplitudes.mean()) - np.log(amplitudes).mean(), _wada_statistics(), _SNR_DB))


@cache
def _wada_statistics() -> np.ndarray:
    """ln E|z| - E ln|z| of speech and noise z at each of ``_SNR_DB``, rising."""
    speech = special.gammaincinv(_SPEECH_SHAPE, (np.arange(2000) + 0.5) / 2000)
    noise = special.ndtri((np.arange(400) + 0.5) / 400)
    power = _SPEECH_SHAPE * (_SPEECH_SHAPE + 1)
    statistics = []
    for ratio in _SNR_DB:
        mixed = np.abs(speech[:, None] + np.sqrt(power / 10 ** (ratio / 10)) * noise)
        statistics.append(np.log(mixed.mean()) - np.log(mixed).mean())
    return np.array(statistics)


def dnsmos(waveform: np.ndarray, sampling_rate: int) -> DNSMOS | None:
    """DNSMOS P.835 (Reddy et al. 2022), by the weights in ``speechmos``, the mean over windows of 9 s a second apart.

    Speech below 9 s is repeated until it is as long.

    Returns:
        None for less than SHORTEST_SECONDS, or silence throughout.

    Raises:
        UserError: a package is missing.
    """
    heard = _heard(waveform, sampling_rate)
    if heard is None:
        return None
    found = _dnsmos_model()(np.clip(heard, -1, 1), RATE, False)  # False: not of one person's voice among others
    return DNSMOS(*(float(found[f"{name}_mos"]) for name in ("ovrl", "sig", "bak")))


@cache
def _dnsmos_model() -> Any:
    require_packages(["dnsmos"])
    import onnxruntime
    from speechmos import dnsmos as package

    folder = Path(str(resources.files("speechmos"))) / "dnsmos_models"
    model = package.DNSMOS(str(folder / "sig_bak_ovr.onnx"), str(folder / "model_v8.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model.onnx_sess, model.p808_onnx_sess = (
        onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        for name in ("sig_bak_ovr", "model_v8")
    )
    return model


def clipping(waveform: np.ndarray) -> float:
    """Fraction of the samples at full scale; 0 of none."""
    return float(np.mean(np.abs(waveform) >= FULL_SCALE)) if len(waveform) else 0.0


def silence(waveform: np.ndarray, sampling_rate: int, level_db: float = -50.0) -> float | None:
    """Fraction of frames of 20 ms whose root mean square is below a level.

    Args:
        level_db: in dB relative to full scale.

    Returns:
        None where there is no whole frame.
    """
    size = max(1, round(FRAME_SECONDS * sampling_rate))
    frames = waveform[: len(waveform) // size * size].reshape(-1, size).astype(np.float64)
    return float(np.mean(np.mean(frames**2, axis=1) < 10 ** (level_db / 10))) if len(frames) else None


def pauses(waveform: np.ndarray, sampling_rate: int, shortest: float = 0.2) -> Pauses | None:
    """Pauses inside speech, by Silero VAD; silence before the first word and after the last is none.

    Args:
        shortest: seconds that a pause has at least.

    Returns:
        None where no speech is found.

    Raises:
        UserError: a package is missing.
    """
    find, model = _voice_activity()
    heard = soxr.resample(waveform, sampling_rate, RATE)
    spoken = find(heard, model, sampling_rate=RATE, speech_pad_ms=0, min_silence_duration_ms=round(1000 * shortest))
    if not spoken:
        return None
    gaps = [(after["start"] - before["end"]) / RATE for before, after in itertools.pairwise(spoken)]
    return Pauses(len(gaps), max(gaps, default=0.0))


@cache
def _voice_activity() -> tuple[Any, Any]:
    require_packages(["pauses"])
    threads = torch.get_num_threads()  # which the package sets to one
    from silero_vad import get_speech_timestamps_sequence, load_silero_vad

    torch.set_num_threads(threads)
    return get_speech_timestamps_sequence, load_silero_vad(sequence=True)


def speaker_similarity(one: np.ndarray, other: np.ndarray, sampling_rate: int) -> float | None:
    """Cosine, 0 to 1, of two utterances' speaker embeddings by Resemblyzer (Wan et al. 2018, GE2E).

    Returns:
        None where one of them has less than SHORTEST_SECONDS of voice.

    Raises:
        UserError: a package is missing.
    """
    one_E, other_E = (speaker_embedding(waveform, sampling_rate) for waveform in (one, other))
    return None if one_E is None or other_E is None else float(one_E @ other_E)


def speaker_embedding(waveform: np.ndarray, sampling_rate: int) -> np.ndarray | None:
    """Embedding (256,) of unit length of an utterance's speaker; None where there is too little voice."""
    prepare, model = _speaker_encoder()
    heard = _heard(waveform, sampling_rate)
    voiced = prepare(heard) if heard is not None else ()
    return model.embed_utterance(voiced) if len(voiced) >= SHORTEST_SECONDS * RATE else None


@cache
def _speaker_encoder() -> tuple[Any, Any]:
    require_packages(["speaker_similarity"])
    from resemblyzer import VoiceEncoder, preprocess_wav

    return preprocess_wav, VoiceEncoder("cpu", verbose=False).eval()


def _heard(waveform: np.ndarray, sampling_rate: int) -> np.ndarray | None:
    """Waveform at RATE; None where it is too short or all silence."""
    if len(waveform) < SHORTEST_SECONDS * sampling_rate or not np.any(waveform):
        return None
    return soxr.resample(waveform, sampling_rate, RATE)
