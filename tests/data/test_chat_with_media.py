"""Chats with real small files: what stands where among the tokens."""

from __future__ import annotations

import re

import numpy as np
import pytest

from omni_train.data.rows.batch import IGNORE, MODALITIES
from omni_train.data.rows.chats import prompt, tokenize
from omni_train.data.samples.features.mel import log_mel
from omni_train.data.samples.lengths import audio_token_start
from omni_train.data.samples.media import read_video
from omni_train.data.samples.sample import Chat, Medium, SampleError, Turn
from omni_train.data.samples.timestamps import inside_sound
from omni_train.recipe.schema import AudioEncoderConfig, LossOn, MediaConfig, ModelConfig, Positions
from tests.support.media import image_file, sound_file, tone, video_file
from tests.support.sized_chats import model_with_encoders

MODEL = model_with_encoders()
AUDIO, IMAGE, VIDEO = Medium("audio", "0.flac"), Medium("image", "1.jpg"), Medium("video", "2.mp4")
LOUD = Medium("video", "2.mp4", sound=True)
STYLES = list(Positions)


@pytest.fixture(scope="module")
def parts() -> dict[str, bytes]:
    generator = np.random.default_rng(3)
    frames = generator.integers(0, 255, (26, 64, 96, 3), dtype=np.uint8)
    return {
        "0.flac": sound_file(tone(3.07)),
        "1.jpg": image_file(frames[0], "JPEG"),
        "2.mp4": video_file(frames, fps=8, sound=tone(3.9)),
        "3.mp4": video_file(frames, fps=8),
        "json": b"{}",
    }


def media_config(**changes) -> MediaConfig:
    sizes = dict(image_min_pixels=1024, video_min_pixels=1024)
    return MediaConfig(**sizes | changes)


def chat(*user_parts: str | Medium) -> Chat:
    return Chat((Turn("user", user_parts), Turn("assistant", ("ristovin",))))


def sequence_of(sample: Chat, tokenizer, parts, *, row_tokens=5000, loss_on=LossOn.assistant, model=MODEL, **changes):
    (sequence,) = tokenize(
        sample,
        tokenizer,
        row_tokens=row_tokens,
        loss_on=loss_on,
        media=media_config(**changes),
        model=model,
        parts=parts,
    )
    return sequence


def shown(sequence, tokenizer) -> str:
    """The user's turn with pads counted: ``audio*3``."""
    text = tokenizer.decode(sequence.tokens.tolist()).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    text = re.sub(r"<\|(\w+)_pad\|>(<\|\1_pad\|>)*", lambda run: f"{run[1]}*{run[0].count('_pad')}", text)
    return re.sub(r"<\|(\w+)\|>", r"[\1]", text)


@pytest.mark.parametrize("style", STYLES)
def test_sound_and_images_stand_between_their_marks(tokenizer, parts, style):
    sequence = sequence_of(chat("hear", AUDIO, "see", IMAGE, "so?"), tokenizer, parts, positions=style)
    assert shown(sequence, tokenizer) == (
        "hear[audio_start]audio*20[audio_end]see[vision_start]image*6[vision_end]so?"  # 307 frames, 2 x 3 blocks
    )
    assert (sequence.tokens[sequence.audio_slots] == tokenizer.token_id("<|audio_pad|>")).all()
    assert (sequence.tokens[sequence.vision_slots] == tokenizer.token_id("<|image_pad|>")).all()
    assert (len(sequence.audio_slots), len(sequence.vision_slots)) == (20, 6)
    np.testing.assert_array_equal(sequence.mel[0], log_mel(sequence_wave(parts)))
    assert [patches.shape for patches in sequence.patches] == [(24, 3 * 2 * 16 * 16)]
    assert sequence.grids == [(1, 4, 6)]
    assert sequence.modality == MODALITIES.index("image")
    assert sequence.positions.shape == (3, len(sequence))
    assert sequence.positions.dtype == (np.float32 if style == Positions.qwen3_omni else np.int64)


def sequence_wave(parts) -> np.ndarray:
    from omni_train.data.samples.media import read_audio

    return read_audio(parts["0.flac"], media_config())


@pytest.mark.parametrize("style", [Positions.absolute, Positions.contiguous])
def test_a_timestamp_stands_before_every_temporal_patch(tokenizer, parts, style):
    # 26 frames of 8 a second, 2 taken a second: 6 frames, 3 patches.
    video = read_video(parts["2.mp4"], media_config(), MODEL.vision, sound=False)
    first, second, third = (f"<{t:.1f} seconds>" for t in video.seconds)
    patch = "[vision_start]video*6[vision_end]"
    sequence = sequence_of(chat("when", VIDEO, "?"), tokenizer, parts, positions=style)
    assert shown(sequence, tokenizer) == f"when{first}{patch}{second}{patch}{third}{patch}?"
    assert sequence.modality == MODALITIES.index("video")
    np.testing.assert_array_equal(sequence.patches[0], video.patches)
    bare = sequence_of(chat("when", VIDEO, "?"), tokenizer, parts, positions=style, video_timestamps=False)
    assert shown(bare, tokenizer) == f"when{patch * 3}?"


def test_sound_of_a_video_stands_at_its_time(tokenizer, parts):
    sequence = sequence_of(chat(LOUD), tokenizer, parts)
    video = read_video(parts["2.mp4"], media_config(), MODEL.vision, sound=True)
    steps = [int(t / 0.16 + 0.5) for t in video.seconds]
    total = -(-len(video.waveform) // 160 // 16)
    heard = np.diff([0, *steps, total])
    sounds = [f"[audio_start]audio*{count}[audio_end]" for count in heard]
    patches = [f"<{t:.1f} seconds>[vision_start]video*6[vision_end]" for t in video.seconds]
    assert (heard > 0).all()  # before the first, between, and after the last
    assert shown(sequence, tokenizer) == sounds[0] + "".join(map("".join, zip(patches, sounds[1:], strict=True)))
    assert sequence.modality == MODALITIES.index("video_audio")
    assert len(sequence.audio_slots) == total


def test_a_released_video_with_sound_is_one_span(tokenizer, parts):
    sequence = sequence_of(chat(LOUD), tokenizer, parts, positions=Positions.qwen3_omni)
    text = shown(sequence, tokenizer)
    assert text.startswith("[vision_start][audio_start]video*6audio*")
    assert text.endswith("[audio_end][vision_end]")
    silent = sequence_of(chat(VIDEO), tokenizer, parts, positions=Positions.qwen3_omni)
    assert shown(silent, tokenizer) == "[vision_start]video*18[vision_end]"


def test_a_video_without_a_sound_track_is_silent_whatever_was_asked(tokenizer, parts):
    quiet = sequence_of(chat(Medium("video", "3.mp4", sound=True)), tokenizer, parts)
    assert quiet.modality == MODALITIES.index("video")
    assert len(quiet.audio_slots) == len(quiet.mel) == 0


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_whole_string(tokenizer, tokenizer_folder, parts, style):
    """Text and timestamps between media are encoded together, as Hugging Face does it."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    cut = Medium("video", "2.mp4", sound=True, start=1)
    sample = chat("\nx\n", VIDEO, "\n", "\n", cut, cut, "<", AUDIO, IMAGE, "\n\n\ny\n")
    stamps = dict(audio_timestamp_seconds=[0.5, 0.9])
    sequence = sequence_of(sample, tokenizer, parts, positions=style, **stamps)
    text = reference.decode(sequence.tokens, skip_special_tokens=False)
    assert reference(text)["input_ids"] == sequence.tokens.tolist()
    assert ("seconds>" in text) == (style != Positions.qwen3_omni)


@pytest.mark.parametrize("loss_on", list(LossOn))
def test_media_are_never_learned(tokenizer, parts, loss_on):
    sequence = sequence_of(
        chat("look ", VIDEO, " hear", AUDIO, "?"), tokenizer, parts, loss_on=loss_on, audio_timestamp_seconds=[1, 1]
    )
    learned = tokenizer.decode([label for label in sequence.labels.tolist() if label != IGNORE])
    expected = {
        "assistant": "ristovin<|im_end|>",
        "all": "look  hear?<|im_end|>ristovin<|im_end|>",
    }
    assert learned == expected[loss_on]


def test_one_file_may_be_shown_twice(tokenizer, parts):
    sequence = sequence_of(chat(IMAGE, "or", IMAGE), tokenizer, parts)
    assert len(sequence.vision_slots) == 12
    assert len(sequence.patches) == 2


@pytest.mark.parametrize("medium", [VIDEO, LOUD])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [1, 2])
def test_videos_get_the_room_that_is_left(tokenizer, parts, style, medium, count):
    sample = chat("hear", AUDIO, *[medium, Medium("video", "3.mp4")][:count])
    sizes = dict(video_fps=8.0, positions=style)
    whole = sequence_of(sample, tokenizer, parts, **sizes)
    room = len(whole) * 4 // 5
    smaller = sequence_of(sample, tokenizer, parts, row_tokens=room, **sizes)
    assert 0.8 * room < len(smaller) <= room
    assert len(smaller.vision_slots) < len(whole.vision_slots)
    with pytest.raises(SampleError, match=r"too_long|video_over_budget"):
        sequence_of(sample, tokenizer, parts, row_tokens=48, **sizes)


def test_what_fits_exactly_is_kept(tokenizer, parts):
    sample = chat("hear", AUDIO, "see", IMAGE)
    length = len(sequence_of(sample, tokenizer, parts))
    assert len(sequence_of(sample, tokenizer, parts, row_tokens=length)) == length
    with pytest.raises(SampleError, match="too_long"):
        sequence_of(sample, tokenizer, parts, row_tokens=length - 1)


@pytest.mark.parametrize(
    ("medium", "model", "reason"),
    [
        (Medium("audio", "9.flac"), MODEL, "media_missing"),
        (AUDIO, ModelConfig(vision=MODEL.vision), "no_audio_encoder"),
        (LOUD, ModelConfig(vision=MODEL.vision), "no_audio_encoder"),
        (IMAGE, ModelConfig(audio=MODEL.audio), "no_vision_encoder"),
        (VIDEO, ModelConfig(audio=MODEL.audio), "no_vision_encoder"),
        (Medium("image", "0.flac"), MODEL, "image_unreadable"),
    ],
)
def test_media_that_cannot_be_taken_are_refused_by_name(tokenizer, parts, medium, model, reason):
    with pytest.raises(SampleError) as error:
        sequence_of(chat(medium), tokenizer, parts, model=model)
    assert error.value.reason == reason


def test_a_model_that_only_sees_takes_videos(tokenizer, parts):
    sequence = sequence_of(chat(VIDEO), tokenizer, parts, model=ModelConfig(vision=MODEL.vision))
    assert sequence.modality == MODALITIES.index("video")


def test_a_prompt_holds_its_media_and_no_answer(tokenizer, parts):
    sample = Chat((*chat("see", IMAGE).turns, Turn("user", (AUDIO,)), Turn("assistant", ("tevin",))))
    whole = sequence_of(sample, tokenizer, parts)
    given, answer = prompt(sample, tokenizer, max_tokens=500, media=media_config(), model=MODEL, parts=parts)
    assert answer == "tevin"
    assert whole.tokens[: len(given)].tolist() == given.tokens.tolist()
    assert tokenizer.decode(given.tokens.tolist()).endswith("<|im_end|>\n<|im_start|>assistant\n")
    np.testing.assert_array_equal(given.positions, whole.positions[:, : len(given)])
    np.testing.assert_array_equal(given.audio_slots, whole.audio_slots)
    assert (given.labels == IGNORE).all()


def test_timestamps_in_a_sound_are_drawn_from_its_bytes():
    audio = AudioEncoderConfig()
    stamps = inside_sound(10_000, audio, [10.0, 30.0], AUDIO, b"a")
    assert stamps == inside_sound(10_000, audio, [10.0, 30.0], AUDIO, b"a")
    assert stamps != inside_sound(10_000, audio, [10.0, 30.0], AUDIO, b"b")
    assert stamps != inside_sound(10_000, audio, [10.0, 30.0], Medium("audio", "0.flac", start=1.0), b"a")
    places = np.array([index for index, _ in stamps])
    gaps = np.diff([0, *places]) * 0.16
    assert (gaps.min(), gaps.max()) >= (9.9, 28.0)
    assert gaps.max() <= 30.1
    assert 1600 - 30.1 < places[-1] * 0.16 < 1600
    assert [text for _, text in stamps] == [f"<{index * 0.16:.1f} seconds>" for index in places]
    assert inside_sound(10_000, audio, [], AUDIO, b"a") == []
    assert inside_sound(60, audio, [10.0, 30.0], AUDIO, b"a") == []  # 9.6 s


def test_timestamps_stand_inside_the_sound(tokenizer, parts):
    sequence = sequence_of(chat(AUDIO), tokenizer, parts, audio_timestamp_seconds=[0.96, 0.96])
    assert shown(sequence, tokenizer) == (
        "[audio_start]audio*6<1.0 seconds>audio*6<1.9 seconds>audio*6<2.9 seconds>audio*2[audio_end]"
    )
    assert len(sequence.audio_slots) == 20
    assert (np.diff(sequence.positions[0]) == 1).all()


def test_audio_tokens_begin_where_their_chunk_has_them():
    released = AudioEncoderConfig(num_convolutions=3, chunk_frames=100)
    assert [audio_token_start(index, released) for index in (0, 12, 13, 14, 26)] == [0, 0.96, 1, 1.08, 2]
    assert audio_token_start(51, AudioEncoderConfig()) == 8.16
