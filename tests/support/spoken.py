"""Spoken samples of a small Talker: frames of 5 ms whose codes number them."""

from __future__ import annotations

import io

import numpy as np

from omni_train.data.rows.base import Reading
from omni_train.data.rows.speech import SpeechSequence, speech_sequence
from omni_train.data.samples.parsing import sample_of
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.recipe.schema import (
    AudioEncoderConfig,
    Code2WavConfig,
    DataConfig,
    MediaConfig,
    ModelConfig,
    SpeechConfig,
    TalkerConfig,
    TalkerStyle,
)
from tests.support.media import sound_file, tone

FRAME = 120  # samples
BOS, EOS, TEXT, PAD, NOTHINK, THINK_BOS, THINK_EOS, ANNA, BEN = range(60, 69)
STATE = 6  # width of the Thinker


def model_of(style: TalkerStyle = TalkerStyle.interleaved) -> ModelConfig:
    talker = TalkerConfig(
        style=style,
        thinker_hidden_size=STATE,
        accept_hidden_layer=1,
        hidden_size=8,
        repeats=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_code_groups=3,
        codebook_size=60,
        codec_vocab_size=70,
        codec_bos_id=BOS,
        codec_eos_id=EOS,
        codec_text_id=TEXT,
        codec_pad_id=PAD,
        codec_nothink_id=NOTHINK,
        codec_think_bos_id=THINK_BOS,
        codec_think_eos_id=THINK_EOS,
        speaker_ids={"anna": ANNA, "ben": BEN},
    )
    audio = AudioEncoderConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    code2wav = Code2WavConfig(num_quantizers=3, codebook_size=60, upsampling_ratios=[2, 4], upsample_rates=[5, 3])
    return ModelConfig(name="speaks", vocab_size=320, talker=talker, audio=audio, code2wav=code2wav)


def data_of(tokenizer_folder, **speech) -> DataConfig:
    return DataConfig(
        name="spoken",
        path="unused",
        tokenizer=str(tokenizer_folder),
        rows="speech",
        row_tokens=192,
        alignment=16,
        media=MediaConfig(audio_timestamp_seconds=[]),
        speech=SpeechConfig(**dict(row_tokens=192) | speech),
        streams=2,
        workers=0,
        shuffle_buffer=5,
        packing_buffer=6,
        max_skip_fraction=0.5,
    )


def codes(frames: int, first: int = 0) -> np.ndarray:
    """Codes (3, frames): frame m has first + m, and 20 and 40 more, modulo 20 each."""
    return (np.array([0, 20, 40])[:, None] + (first + np.arange(frames)) % 20).astype(np.uint16)


def array_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def wave_file(frames: float) -> bytes:
    return sound_file(tone(frames * FRAME / 24000, 24000), 24000, "WAV")


def heard(seconds: float, *texts: str) -> dict:
    """Message of a user: texts, then a sound of so many seconds, which is ``HEARD``'s file of that name."""
    parts = [{"type": "text", "text": text} for text in texts]
    return {"role": "user", "content": [*parts, {"type": "audio", "audio": f"heard{seconds:g}.flac"}]}


def files(frames: int, *, sounds: tuple[float, ...] = (), reference: int = 0, first: int = 0) -> dict[str, bytes]:
    """Files of a sample whose speech has so many frames."""
    found = {"0.wav": wave_file(frames), "codes.npy": array_file(codes(frames, first))}
    found |= {f"heard{seconds:g}.flac": sound_file(tone(seconds)) for seconds in sounds}
    if reference:
        found["voice.codes.npy"] = array_file(codes(reference, first=11))
    return found


def sequence_of(
    fields: dict, parts: dict[str, bytes], tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, **drawn
) -> SpeechSequence:
    """Sequence of a sample whose speech is ``0.wav``; with ``seed`` and ``key`` its draws are drawn."""
    return speech_sequence(sample_of({"speech": "0.wav"} | fields), parts, Reading(tokenizer, data, model, **drawn))
