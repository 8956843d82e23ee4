"""Rows of transcripts: what is in them, what is refused, and augmentation that differs by epoch and resumes exactly."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from omni_train.data.rows.batch import IGNORE, MODALITIES
from omni_train.data.rows.kinds import held_out
from omni_train.data.rows.transcripts import split_tag, tag_end, transcript_prompt, transcript_sequence
from omni_train.data.samples.augmentation import Augmentation
from omni_train.data.samples.features.mel import log_mel
from omni_train.data.samples.lengths import audio_tokens
from omni_train.data.samples.media import read_audio
from omni_train.data.samples.parsing import parse_sample
from omni_train.data.samples.sample import SampleError
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.recipe.schema import AugmentationConfig, DataConfig, EvaluationConfig, MediaConfig, SourceConfig
from tests.data.conftest import MODEL, documents
from tests.data.test_loader import assert_same, take, through_a_file
from tests.support.media import sound_file, tone

SEED = 23
SOUND = {"type": "audio", "audio": "0.wav"}


def fields(answer: str | None = "kalan moper", content: list | None = None, **meta) -> dict:
    messages = [{"role": "user", "content": content or [SOUND, {"type": "text", "text": "tezu?"}]}]
    messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    return {"messages": messages, "meta": meta}


def clip(seconds: float, hertz: float = 440.0) -> bytes:
    return sound_file(tone(seconds, hertz=hertz), format="WAV")


def mel_of(sound: bytes) -> np.ndarray:
    return log_mel(read_audio(sound, MediaConfig()))


def sequence_of(sample: dict, tokenizer, row_tokens: int = 99, make=transcript_sequence):
    length = {"row_tokens" if make is transcript_sequence else "max_tokens": row_tokens}
    return make(
        parse_sample(json.dumps(sample).encode()),
        tokenizer,
        media=MediaConfig(),
        model=MODEL,
        parts={"0.wav": clip(0.7)},
        **length,
    )


@pytest.mark.parametrize(
    ("language", "tag"), [("en", "en"), ("pt-BR", "pt"), ("zh_CN", "zh"), ("cmn", "zh"), (None, "unknown")]
)
def test_a_sequence_is_the_clip_and_then_the_language_and_the_transcript(tokenizer, language, tag):
    sample = fields("  kalan\n moper ", task="transcribe", **({"language": language} if language else {}))
    sequence = sequence_of(sample, tokenizer)
    heard = audio_tokens(70, MODEL.audio)
    assert sequence.audio_slots.tolist() == list(range(heard))
    assert sequence.tokens[:heard].tolist() == [tokenizer.token_id("<|audio_pad|>")] * heard
    assert sequence.tokens[heard] == tokenizer.im_start
    written = sequence.tokens[heard + 1 :].tolist()
    assert written[-1] == tokenizer.im_end
    assert split_tag(written[:-1], tokenizer) == (tag, "kalan moper")
    assert sequence.labels.tolist() == [IGNORE] * heard + written + [IGNORE]
    np.testing.assert_array_equal(sequence.mel[0], mel_of(clip(0.7)))
    assert MODALITIES[sequence.modality] == "audio"


def test_a_transcript_without_its_tag_is_none(tokenizer):
    assert split_tag(tokenizer.encode("kalan moper"), tokenizer) == ("kalan moper", "")
    assert split_tag([], tokenizer) == ("", "")
    assert tag_end(tokenizer) in tokenizer.encode("en\n")


@pytest.mark.parametrize(
    ("sample", "row_tokens", "reason"),
    [
        ({"text": "kalan"}, 99, "no_audio"),
        (fields(content=[{"type": "text", "text": "kalan?"}]), 99, "no_audio"),
        (fields(None), 99, "no_answer"),
        (fields(" \n"), 99, "no_answer"),
        (fields(task="answer"), 99, "no_transcript"),
        (fields(language="Chinese"), 99, "unknown_language"),
        (fields(content=[{"type": "audio", "audio": "1.wav"}]), 99, "media_missing"),
        (fields(), 12, "too_long"),
        (fields("kalan " * 90), 99, "too_long"),
    ],
)
def test_what_is_no_transcript_is_refused(tokenizer, sample, row_tokens, reason):
    with pytest.raises(SampleError) as error:
        sequence_of(sample, tokenizer, row_tokens=row_tokens)
    assert error.value.reason == reason


def test_a_row_is_filled_to_its_last_token(tokenizer):
    sequence = sequence_of(fields(), tokenizer)
    assert len(sequence_of(fields(), tokenizer, row_tokens=len(sequence))) == len(sequence)
    with pytest.raises(SampleError):
        sequence_of(fields(), tokenizer, row_tokens=len(sequence) - 1)


def test_a_prompt_is_what_comes_before_the_language(tokenizer):
    sequence = sequence_of(fields(), tokenizer)
    prompt, answer = sequence_of(fields(), tokenizer, make=transcript_prompt)
    heard = len(sequence.audio_slots)
    assert prompt.tokens.tolist() == sequence.tokens[: heard + 1].tolist()
    assert (prompt.labels == IGNORE).all() and answer == "kalan moper"
    np.testing.assert_array_equal(prompt.mel[0], sequence.mel[0])


AUGMENTATION = AugmentationConfig(
    speeds=[0.8, 1.0, 1.25], noise_probability=0.5, noise_snr_db=[3.0, 9.0], time_mask_frames=40, time_mask_fraction=0.5
)
OFF = AugmentationConfig(speeds=[], noise_probability=0.0, frequency_masks=0, time_masks=0)


def test_speed_changes_length_and_pitch():
    wave = tone(0.9, hertz=400.0)[:, 0]
    faster = Augmentation(dataclasses.replace(OFF, speeds=[1.25]), SEED, "key").waveform(wave)
    assert len(faster) == pytest.approx(len(wave) / 1.25, abs=1)
    assert np.abs(np.fft.rfft(faster)).argmax() * 16000 / len(faster) == pytest.approx(500.0, abs=2)
    shortest = wave[:161]
    assert Augmentation(dataclasses.replace(OFF, speeds=[1.25]), SEED, "key").waveform(shortest) is shortest


def test_noise_has_the_drawn_power():
    wave = tone(2.0)[:, 0]
    config = dataclasses.replace(OFF, noise_probability=1.0, noise_snr_db=[7.0, 7.0])
    noisy = Augmentation(config, SEED, 5).waveform(wave)
    assert noisy.dtype == np.float32
    assert 10 * np.log10(np.mean(wave**2) / np.mean((noisy - wave) ** 2)) == pytest.approx(7.0, abs=0.01)


def test_masks_hide_stripes_of_bounded_width():
    mel = np.random.default_rng(1).standard_normal((50, 32)).astype(np.float32)
    config = dataclasses.replace(OFF, frequency_mask_bins=5, time_mask_frames=100, time_mask_fraction=0.2)
    of_bins, of_frames = (dataclasses.replace(config, **{name: 1}) for name in ("frequency_masks", "time_masks"))
    wide, long = set(), set()
    for key in range(200):
        (bins,) = np.nonzero((Augmentation(of_bins, 0, key).mel(mel) != mel).all(0))
        (frames,) = np.nonzero((Augmentation(of_frames, 0, key).mel(mel) != mel).all(1))
        assert all(np.diff(bins) == 1) and all(np.diff(frames) == 1)
        wide.add(len(bins))
        long.add(len(frames))
    assert wide == set(range(6)) and long == set(range(11))


def test_draws_follow_seed_and_key_alone():
    wave = tone(0.5)[:, 0]

    def heard(seed, key):
        draw = Augmentation(AUGMENTATION, seed, key)
        return draw.mel(log_mel(draw.waveform(wave)))

    again = [heard(seed, key) for seed, key in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    np.testing.assert_array_equal(again[0], again[1])
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(again[1:], 2))
    np.testing.assert_array_equal(Augmentation(OFF, 1, "a").waveform(wave), wave)


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Clips and other chats, with train and val splits."""
    root = tmp_path_factory.mktemp("transcripts")
    samples = []
    for n in range(18):
        said = fields(f"mo{n}", task="transcribe", language="en")
        samples.append((f"s{n:03d}", said, {"0.wav": clip(0.3 + 0.05 * n, 200 + 30 * n)}))
    samples[4] = ("s004", fields("red", task="color"), samples[4][2])
    samples += documents(3, seed=2)
    for split in ("train", "val"):
        write_shards(root, split, [(f"{split}-{key}", *rest) for key, *rest in samples], 2)
    index_shards(root)
    return root


@pytest.fixture
def transcripts(config: DataConfig, speech: Path) -> DataConfig:
    return dataclasses.replace(
        config,
        sources=[SourceConfig(str(speech))],
        rows="transcripts",
        row_tokens=64,
        alignment=4,
        streams=2,
        shuffle_buffer=5,
        packing_buffer=4,
        max_skip_fraction=0.5,
        augmentation=AUGMENTATION,
    )


def clips_by_text(rows, tokenizer) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for row in rows:
        texts = [
            split_tag([t for t in labels[labels != IGNORE].tolist() if t != tokenizer.im_end], tokenizer)[1]
            for labels in row.labels.tensor_split(row.cu_seqlens[1:-1].long())
            if (labels != IGNORE).any()
        ]
        mels = row.mel.split(row.mel_cu_seqlens.diff().tolist())
        for text, mel in zip(texts, mels, strict=True):
            found.setdefault(text, []).append(mel.numpy())
    return found


def test_every_reading_of_a_clip_sounds_different_and_evaluation_always_the_same(transcripts, tokenizer):
    loader = build_loader(transcripts, MODEL, seed=SEED)
    rows = take(loader, 40)
    heard = clips_by_text(rows, tokenizer)
    assert set(heard) == {f"mo{n}" for n in range(18) if n != 4}
    assert min(map(len, heard.values())) > 3
    for clips in heard.values():
        assert not any(np.array_equal(one, other) for one, other in itertools.combinations(clips, 2))
    refused = {reason for row in rows for reason in row.skipped}
    assert refused == {"no_audio", "no_transcript"}

    held_out = evaluation_rows(transcripts, MODEL, rows=3)
    assert_same(held_out, evaluation_rows(dataclasses.replace(transcripts, augmentation=None), MODEL, rows=3))


@pytest.mark.parametrize("taken", [3, 31])
def test_augmented_rows_go_on_the_same_after_a_resume(transcripts, taken):
    loader = build_loader(transcripts, MODEL, seed=SEED)
    take(loader, taken)
    state = through_a_file(loader.state_dict())
    expected = take(loader, 30)
    restored = build_loader(dataclasses.replace(transcripts, workers=2), MODEL, seed=SEED)
    restored.load_state_dict(state)
    assert_same(take(restored, 30), expected)


def test_held_out_questions_are_clips_without_augmentation(transcripts, tokenizer):
    questions = held_out(transcripts, MODEL, EvaluationConfig(every=1, samples=7, print_samples=2))
    assert [question.answer for question in questions] == [f"mo{n}" for n in (0, 2, 6, 8, 10, 12)]
    assert all(question.prompt.tokens[-1] == tokenizer.im_start for question in questions)
    assert [len(question.media) for question in questions] == [1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(questions[1].prompt.mel[0], mel_of(clip(0.4, 260)))
