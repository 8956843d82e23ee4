"""Rotary ids against transformers', for random conversations, and what `absolute` promises."""

from __future__ import annotations

import dataclasses
import functools
from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import MODALITIES
from omni_train.data.rows.packing import pack
from omni_train.data.samples.lengths import audio_tokens
from omni_train.data.samples.positions import IMAGE_PAD, Block, Frame, Text, rotary_ids
from omni_train.data.samples.sample import Chat, Medium, Turn
from omni_train.recipe.schema import MediaConfig, Positions
from tests.support.sized_chats import Conversation, conversation, model_with_encoders

MIXTURES = 60
RELEASED = dict(convolutions=3, chunk_frames=100)  # the audio encoder of Qwen3-Omni


def bound(cls, methods, **fields):
    """The methods of a model class on an object that has only what they read."""
    made = SimpleNamespace(**fields)
    for name in methods:
        setattr(made, name, functools.partial(getattr(cls, name), made))
    return made


def token_ids(tokenizer) -> dict[str, int]:
    names = {f"{kind}_token_id": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")}
    names |= {f"{kind}_start_token_id": f"<|{kind}_start|>" for kind in ("vision", "audio")}
    return {field: tokenizer.token_id(name) for field, name in names.items()}


def in_order(made: Conversation, kinds: str, values: dict) -> list:
    return [values[medium.file] for medium in made.chat.media if medium.file[-1] in kinds]


def grids(made: Conversation, kinds: str) -> torch.Tensor | None:
    return torch.tensor(found) if (found := in_order(made, kinds, made.grids)) else None


def qwen3_omni_ids(made: Conversation, tokens: np.ndarray, tokenizer, merge: int = 2) -> torch.Tensor:
    modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    cls = modeling.Qwen3OmniMoePreTrainedModelForConditionalGeneration
    config = SimpleNamespace(
        **token_ids(tokenizer), position_id_per_seconds=13, audio_config=SimpleNamespace(n_window=50)
    )
    model = bound(cls, ["get_rope_index", "get_llm_pos_ids_for_vision"], spatial_merge_size=merge, config=config)
    spacing = [made.seconds_per_grid(medium.file) for medium in made.chat.media if medium.kind == "video"]
    ids, _ = model.get_rope_index(
        torch.tensor(tokens, dtype=torch.int64)[None],
        grids(made, "i"),
        grids(made, "vs"),
        torch.ones(1, len(tokens), dtype=torch.int64),
        any(medium.sound for medium in made.chat.media),
        torch.tensor([samples // 160 for samples in in_order(made, "as", made.samples)]),
        torch.tensor(spacing),
    )
    return ids[:, 0]


def qwen3_5_ids(made: Conversation, tokens: np.ndarray, tokenizer, merge: int = 2) -> torch.Tensor:
    modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=merge))
    model = bound(modeling.Qwen3_5MoeModel, ["get_rope_index", "get_vision_position_ids"], config=config)
    names = token_ids(tokenizer)
    tokens = torch.tensor(tokens, dtype=torch.int64)[None]
    types = (tokens == names["image_token_id"]).int() + 2 * (tokens == names["video_token_id"]).int()
    return model.get_rope_index(tokens, types, grids(made, "i"), grids(made, "vs"))[0][:, 0]


def own_ids(sequence) -> np.ndarray:
    """(3, n), counted from 0 where the sequence leaves them out."""
    return sequence.positions if sequence.positions is not None else np.tile(np.arange(len(sequence)), (3, 1))


@pytest.mark.parametrize("kinds", ["", "a", "i", "v", "s", "aiv", "ais"])
def test_ids_of_qwen3_omni_are_those_of_transformers(monkeypatch, tokenizer, kinds):
    media = MediaConfig(positions=Positions.qwen3_omni)
    for seed in range(MIXTURES):
        merge = 1 + seed % 3
        made = conversation(seed, kinds, merge=merge)
        sequence = made.tokenize(monkeypatch, tokenizer, model_with_encoders(merge, **RELEASED), media)
        expected = qwen3_omni_ids(made, sequence.tokens, tokenizer, merge)
        assert torch.equal(torch.from_numpy(own_ids(sequence)).float(), expected), seed


def test_ids_are_rounded_where_transformers_rounds_them(tokenizer):
    # Beyond a power of two a float loses a bit, and it matters in which order lengths are added.
    video, image = Medium("video", "0.v"), Medium("image", "1.i")
    names = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>", "<|image_pad|>")
    start, frame, end, pixel = (tokenizer.token_id(name) for name in names)
    seconds = 2 / 4.841999218071319 * np.arange(4)
    made = Conversation(
        Chat((Turn("user", (video, image)),)), {}, {"0.v": (4, 2, 2), "1.i": (1, 2, 2)}, {"0.v": seconds}
    )
    (word,) = tokenizer.encode("a")
    for length in range(200, 270):
        tokens = [start, *[frame] * 4, end, *[word] * length, start, pixel, end, word]
        clip = Block(4, 1, 1, made.seconds_per_grid("0.v"), 0)
        runs = [Text(1), clip, Text(1), Text(length), Text(1), Frame(IMAGE_PAD, 1, 1), Text(1), Text(1)]
        ids, *_ = rotary_ids(runs, Positions.qwen3_omni)
        assert torch.equal(torch.from_numpy(ids), qwen3_omni_ids(made, np.array(tokens), tokenizer)), length


@pytest.mark.parametrize("kinds", ["", "i", "v", "iv"])
@pytest.mark.parametrize("timestamps", [True, False])
def test_contiguous_ids_are_those_of_qwen3_5(monkeypatch, tokenizer, kinds, timestamps):
    media = MediaConfig(positions=Positions.contiguous, video_timestamps=timestamps)
    for seed in range(MIXTURES):
        merge = 1 + seed % 3
        made = conversation(seed, kinds, merge=merge)
        sequence = made.tokenize(monkeypatch, tokenizer, model_with_encoders(merge), media)
        expected = qwen3_5_ids(made, sequence.tokens, tokenizer, merge)
        assert torch.equal(torch.from_numpy(own_ids(sequence)), expected), seed


@pytest.mark.parametrize("style", [Positions.qwen3_omni, Positions.contiguous])
def test_ids_start_anew_in_each_sequence_of_a_row(monkeypatch, tokenizer, style):
    media = MediaConfig(positions=style, audio_timestamp_seconds=[])
    kinds, oracle = ("aiv", qwen3_omni_ids) if style == Positions.qwen3_omni else ("iv", qwen3_5_ids)
    for seed in range(0, MIXTURES, 4):
        several = [conversation(seed + n, kinds) for n in range(3)] + [conversation(seed, "")]
        sequences = [made.tokenize(monkeypatch, tokenizer, model_with_encoders(**RELEASED), media) for made in several]
        room = sum(len(sequence) + 16 for sequence in sequences) // 16 * 16
        row = pack(sequences, row_tokens=room, alignment=16, padding_token=0)
        for made, sequence, start in zip(several, sequences, row.cu_seqlens.tolist(), strict=False):
            expected = oracle(made, sequence.tokens, tokenizer)
            assert torch.equal(row.position_ids[:, start : start + len(sequence)], expected), seed


def test_videos_with_and_without_sound_stand_in_one_conversation(monkeypatch, tokenizer):
    """transformers has one flag for all: ours is held against its two answers, one after the other."""
    media, model = MediaConfig(positions=Positions.qwen3_omni), model_with_encoders(**RELEASED)
    for seed in range(MIXTURES):
        loud, quiet = conversation(seed, "ais", spacing=0.5), conversation(seed + 1, "aiv", spacing=0.25)
        renamed = {medium: f"second-{medium.file}" for medium in quiet.chat.media}
        both = Conversation(
            Chat(loud.chat.turns + tuple(_rename(turn, renamed) for turn in quiet.chat.turns)),
            loud.samples | {f"second-{file}": value for file, value in quiet.samples.items()},
            loud.grids | {f"second-{file}": value for file, value in quiet.grids.items()},
            loud.seconds | {f"second-{file}": value for file, value in quiet.seconds.items()},
        )
        sequence = both.tokenize(monkeypatch, tokenizer, model, media)
        first, second = (made.tokenize(monkeypatch, tokenizer, model, media).tokens for made in (loud, quiet))
        assert sequence.tokens.tolist() == [*first, *second]
        before, after = qwen3_omni_ids(loud, first, tokenizer), qwen3_omni_ids(quiet, second, tokenizer)
        after = after + before[:, -1:] + 1  # both end in text
        assert torch.equal(torch.from_numpy(sequence.positions), torch.cat([before, after], dim=1)), seed


def _rename(turn, renamed):
    replace = dataclasses.replace
    return replace(
        turn, parts=tuple(replace(part, file=renamed[part]) if part in renamed else part for part in turn.parts)
    )


def test_sound_stands_among_the_patches_as_the_processor_of_qwen3_omni_puts_it(monkeypatch, tokenizer):
    processing = pytest.importorskip("transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe")
    names = dict(video_token="v", audio_token="a", audio_bos_token="", audio_eos_token="")
    processor = SimpleNamespace(**names, video_processor=SimpleNamespace(merge_size=2))
    for seed in range(MIXTURES):
        made = conversation(seed, "s", spacing=(0.25, 0.5, 2.0)[seed % 3])
        media = MediaConfig(positions=Positions.qwen3_omni)
        sequence = made.tokenize(monkeypatch, tokenizer, model_with_encoders(**RELEASED), media)
        grid = np.array(in_order(made, "s", made.grids))
        frames = np.array(in_order(made, "s", made.samples)) // 160
        audio = dict(num_audio_tokens=[audio_tokens(count, model_with_encoders(**RELEASED).audio) for count in frames])
        spacing = [made.seconds_per_grid(medium.file) for medium in made.chat.media]
        video = dict(video_grid_thw=grid, video_second_per_grid=spacing)
        expected = "".join(
            processing.Qwen3OmniMoeProcessor.replace_video_with_audio_token(
                processor, video, n, audio, n, position_id_per_seconds=13.0
            )
            for n in range(len(grid))
        )
        audio_pad, video_pad = tokenizer.token_id("<|audio_pad|>"), tokenizer.token_id("<|video_pad|>")
        ours = "".join({audio_pad: "a", video_pad: "v"}.get(token, "") for token in sequence.tokens.tolist())
        assert ours == expected, seed


def absolute(monkeypatch, tokenizer, made: Conversation, **changes):
    media = MediaConfig(**dict(positions=Positions.absolute, audio_timestamp_seconds=[1.0, 3.0]) | changes)
    return made.tokenize(monkeypatch, tokenizer, model_with_encoders(), media)


class Kind(IntEnum):
    """What stands at a token's place."""

    text = 0
    audio = 1
    image = 2
    video = 3


def kinds_of(sequence, tokenizer) -> np.ndarray:
    pads = {tokenizer.token_id(f"<|{kind.name}_pad|>"): kind for kind in Kind if kind != Kind.text}
    return np.array([pads.get(token, Kind.text) for token in sequence.tokens.tolist()])


@pytest.mark.parametrize("kinds", ["a", "i", "v", "s", "aivs"])
@pytest.mark.parametrize("timestamps", [True, False])
def test_absolute_time_never_runs_backwards(monkeypatch, tokenizer, kinds, timestamps):
    for seed in range(MIXTURES):
        sequence = absolute(monkeypatch, tokenizer, conversation(seed, kinds), video_timestamps=timestamps)
        positions, kind = sequence.positions, kinds_of(sequence, tokenizer)
        step = np.diff(positions[0])
        # Only tokens of one patch share a time.
        same_patch = (kind[1:] == kind[:-1]) & (kind[1:] >= Kind.image)
        assert (step[~same_patch] >= 1).all()
        assert (step >= 0).all()
        assert (positions[:, kind <= Kind.audio] == positions[0, kind <= Kind.audio]).all()
        assert (positions.min(axis=0) == positions[0]).all()  # rows and columns count on from the time


@pytest.mark.parametrize("kinds", ["i", "v", "s", "vs"])
def test_after_a_medium_absolute_ids_go_on_from_the_largest(monkeypatch, tokenizer, kinds):
    for seed in range(MIXTURES):
        sequence = absolute(monkeypatch, tokenizer, conversation(seed, kinds))
        ends = np.flatnonzero(sequence.tokens == tokenizer.im_end)
        for end in ends[sequence.tokens[ends - 1] == tokenizer.token_id("<|vision_end|>")]:
            assert (sequence.positions[:, end] == sequence.positions[:, :end].max() + 1).all()


@pytest.mark.parametrize(("timestamps", "spacing"), [(True, 3.21), (False, 0.97)])
def test_absolute_patches_lie_on_the_grid_of_160_ms(monkeypatch, tokenizer, timestamps, spacing):
    for seed in range(MIXTURES):
        made = conversation(seed, "v", spacing=spacing)
        sequence = absolute(monkeypatch, tokenizer, made, video_timestamps=timestamps)
        times = sequence.positions[0, sequence.vision_slots]
        for medium in made.chat.media:
            t, h, w = made.grids[medium.file]
            own, times = times[: t * h * w // 4].reshape(t, -1), times[t * h * w // 4 :]
            steps = np.floor(made.seconds[medium.file] / 0.16 + 0.5)
            assert (own - own[0] == (steps - steps[0])[:, None]).all(), seed
        assert len(times) == 0


@pytest.mark.parametrize("style", [Positions.absolute, Positions.contiguous])
def test_sound_and_patches_stand_in_order_of_time_and_nothing_is_lost(monkeypatch, tokenizer, style):
    for seed in range(MIXTURES):
        made = conversation(seed, "s")
        sequence = absolute(monkeypatch, tokenizer, made, positions=style)
        kind = kinds_of(sequence, tokenizer)
        media_only = kind[kind != Kind.text].tolist()
        for medium in made.chat.media:
            t, h, w = made.grids[medium.file]
            sound = audio_tokens(made.samples[medium.file] // 160, model_with_encoders().audio)
            own, media_only = media_only[: t * h * w // 4 + sound], media_only[t * h * w // 4 + sound :]
            order = [(step / 6.25, Kind.audio) for step in range(sound)]
            # A patch comes before the sound of its step of 160 ms: sorted by step, patches first on ties.
            order += [(int(s * 6.25 + 0.5) / 6.25, Kind.text) for s in made.seconds[medium.file]] * (h * w // 4)
            expected = [Kind.video if which == Kind.text else which for _, which in sorted(order)]
            assert own == expected, seed
        assert media_only == []
        assert sequence.modality == MODALITIES.index("video_audio")


def test_sound_of_several_chunks_has_the_length_of_the_released_formula(monkeypatch, tokenizer):
    processing = pytest.importorskip("transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe")
    released, ours = model_with_encoders(**RELEASED).audio, model_with_encoders().audio
    for frames in [1, 15, 16, 99, 100, 101, 107, 108, 199, 200, 3000, 6123, 360_000]:
        expected = processing._get_feat_extract_output_lengths(torch.tensor(frames)).item()
        assert audio_tokens(frames, released) == expected
        assert audio_tokens(frames, ours) == -(-frames // 16)
    made = conversation(2, "a")
    (file, *_) = made.samples
    made.samples[file] = 16000 * 37 + 159
    sequence = made.tokenize(
        monkeypatch, tokenizer, model_with_encoders(**RELEASED), MediaConfig(positions=Positions.qwen3_omni)
    )
    assert len(sequence.mel[0]) == 3700
    assert len(sequence.audio_slots) == sum(audio_tokens(len(mel), released) for mel in sequence.mel)
