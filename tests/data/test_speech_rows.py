"""Rows of the Talker: what refuses a sample, how two lengths are packed, and the same rows after a resume."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.kinds import check_rows, kind_of
from omni_train.data.rows.speech_packing import pack_speech
from omni_train.data.rows.spoken_prompts import held_out_prompts
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.tokenizer import CONTROL_TOKENS, Tokenizer
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.errors import UserError
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import (
    Context,
    EvaluationConfig,
    LossOn,
    ModelConfig,
    ScheduleKind,
    SourceConfig,
    SpeechScheduleConfig,
    States,
    SwitchLabel,
    TalkerStyle,
)
from tests.data.test_loader import take, through_a_file
from tests.support.spoken import (
    STATE,
    array_file,
    codes,
    data_of,
    files,
    heard,
    model_of,
    sequence_of,
    wave_file,
)

DUAL, INTERLEAVED = model_of(TalkerStyle.dual_track), model_of()
SEED = 67
OTHERS = ("skipped", "samples", "strata", "left_out", "prepared")
TENSORS = [spec.name for spec in dataclasses.fields(SpeechRow) if spec.name not in OTHERS]
ASKED = {"messages": [heard(0.5), {"role": "assistant", "content": "123"}]}


def assert_same(rows: list[SpeechRow], others: list[SpeechRow]) -> None:
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        for name in TENSORS:
            assert torch.equal(getattr(row, name), getattr(other, name)), name
        assert (row.samples, row.skipped, row.strata) == (other.samples, other.skipped, other.strata)


SAID = {"text": "123"}
VOICE = {"text": "123", "voice": {"speech": "1.wav"}}


@pytest.mark.parametrize(
    ("reason", "fields", "parts", "model", "speech"),
    [
        ("no_speech", SAID | {"speech": None}, files(5), INTERLEAVED, {}),
        ("no_text", {"messages": [heard(0.5), {"role": "assistant", "content": " \n"}]}, files(5), INTERLEAVED, {}),
        ("no_text", {"messages": [heard(0.5)]}, files(5), INTERLEAVED, {}),
        ("media_missing", SAID, {"codes.npy": b""}, INTERLEAVED, {}),
        ("media_missing", ASKED, files(5), INTERLEAVED, {}),
        ("no_codes", SAID, {"0.wav": wave_file(5)}, INTERLEAVED, {}),
        ("codes_unreadable", SAID, files(5) | {"codes.npy": b"codes"}, INTERLEAVED, {}),
        ("codes_mismatch", SAID, files(5) | {"codes.npy": array_file(codes(5)[:2])}, INTERLEAVED, {}),
        ("codes_mismatch", SAID, files(5) | {"codes.npy": array_file(codes(5) + 16)}, INTERLEAVED, {}),  # 60
        ("codes_mismatch", SAID, files(5) | {"codes.npy": array_file(codes(8))}, INTERLEAVED, {}),
        ("codes_mismatch", SAID, files(8) | {"codes.npy": array_file(codes(5))}, INTERLEAVED, {}),
        ("text_too_long_for_speech", {"text": "123456789"}, files(2), INTERLEAVED, {}),
        ("text_too_long_for_speech", SAID, {"0.wav": wave_file(2), "codes.npy": array_file(codes(0))}, INTERLEAVED, {}),
        ("text_too_long_for_speech", SAID | {"voice": {"name": "anna"}}, files(2), DUAL, {}),
        ("speech_too_long_for_text", {"text": "1"}, files(5), INTERLEAVED, {"max_frames_per_token": 4.0}),
        ("too_long", {"text": "1" * 150}, files(40), INTERLEAVED, {}),
        ("too_long", SAID, files(192), INTERLEAVED, {}),
        ("too_long", {"text": "1" * 300000}, files(40), INTERLEAVED, {}),
        ("too_long", {"messages": [heard(31.0), *ASKED["messages"]]}, files(5, sounds=(0.5, 31.0)), INTERLEAVED, {}),
        ("no_speaker", SAID, files(5), DUAL, {}),
        ("no_speaker", SAID | {"voice": {"name": "nobody"}}, files(5), DUAL, {}),
        ("no_speaker", SAID | {"voice": {"description": "anna"}}, files(5), DUAL, {}),
        ("no_voice_codes", VOICE, files(5), INTERLEAVED, {}),
        ("voice_codes_unreadable", VOICE, files(5) | {"voice.codes.npy": b""}, INTERLEAVED, {}),
        ("voice_codes_mismatch", VOICE, files(5) | {"voice.codes.npy": array_file(codes(5)[1:])}, INTERLEAVED, {}),
        ("voice_empty", VOICE, files(5) | {"voice.codes.npy": array_file(codes(0))}, INTERLEAVED, {}),
        ("voice_empty", VOICE, files(5) | {"voice.codes.npy": array_file(codes(9) * 0)}, INTERLEAVED, {}),
        ("no_states", ASKED, files(5, sounds=(0.5,)), INTERLEAVED, {"states": States.stored}),
        *(
            (reason, ASKED, files(5, sounds=(0.5,)) | {"states.npy": stored}, INTERLEAVED, {"states": States.stored})
            for reason, stored in (
                ("states_unreadable", b"states"),
                ("states_unreadable", array_file(np.zeros((4, STATE), np.int64))),
                ("states_mismatch", array_file(np.zeros((5, STATE), np.float32))),
                ("states_mismatch", array_file(np.zeros((4, STATE + 1), np.float32))),
            )
        ),
    ],
)
def test_a_sample_is_refused_by_its_reason(tokenizer, tokenizer_folder, reason, fields, parts, model, speech):
    with pytest.raises(SampleError) as refused:
        sequence_of(fields, parts, tokenizer, data_of(tokenizer_folder, **speech), model)
    assert refused.value.reason == reason


def test_what_is_at_the_bounds_is_not_refused(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder, max_frames_per_token=4.0)
    assert len(sequence_of({"text": "1"}, files(4), tokenizer, data, INTERLEAVED))
    assert len(sequence_of({"text": "12345678"}, files(2), tokenizer, data, INTERLEAVED))
    for frames in (5, 7):  # files do not tell their length exactly
        parts = files(6) | {"codes.npy": array_file(codes(frames))}
        sequence = sequence_of(SAID, parts, tokenizer, data, INTERLEAVED)
        assert (sequence.plan.kinds == SpeechRow.KINDS.index("speech")).sum() == frames
    head = len(sequence) - 7 - 3 - 1
    data.speech.max_frames_per_token = 100.0
    full = sequence_of(SAID, files(192 - head - 4), tokenizer, data, INTERLEAVED)
    assert len(full) == data.speech.row_tokens
    with pytest.raises(SampleError, match="too_long"):
        sequence_of(SAID, files(192 - head - 3), tokenizer, data, INTERLEAVED)


def test_a_row_holds_sequences_that_read_states_and_others(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder)
    fields = [ASKED, SAID, {"messages": [heard(1.2), *ASKED["messages"]]}]
    parts = files(5, sounds=(0.5, 1.2))
    pieces = [sequence_of(one, parts, tokenizer, data, INTERLEAVED, seed=5, key=(str(one),)) for one in fields]
    row = pack_speech(pieces, row_tokens=192, speech_row_tokens=192, alignment=16, padding_token=9)
    assert row.samples == 3 and row.tokens.shape == (192,) and row.text_ids.shape == (192,)
    bounds = row.speech_cu_seqlens.tolist()
    assert bounds == [0, *itertools.accumulate(-(-len(piece) // 16) * 16 for piece in pieces), 192]
    assert len(row.cu_seqlens) == 4  # two sequences and padding
    assert row.context.tolist() == [
        *pieces[0].positions.tolist(),
        *(int(row.cu_seqlens[1]) + pieces[2].positions).tolist(),
    ]
    assert row.sources[row.sources >= 0].tolist() == [*range(4), *range(4, 4 + 8 + 4)]
    for piece, start in zip(pieces, bounds, strict=False):
        own = slice(start, start + len(piece))
        for name, mine in (("text_ids", "text_ids"), ("codes", "codes"), ("speech_labels", "labels")):
            assert torch.equal(getattr(row, name)[own], torch.from_numpy(getattr(piece.plan, mine)))
        assert torch.equal(row.label_codes[own], torch.from_numpy(piece.plan.label_codes))
        assert torch.equal(row.draws[own], torch.from_numpy(piece.draws))
        assert not row.speech_padding[own].any() and row.speech_positions[0, own].tolist() == [*range(len(piece))]
    padding = row.speech_padding
    assert int((~padding).sum()) == sum(map(len, pieces)) == int(row.tokens_by_modality().sum())
    assert (row.speech_labels[padding] == IGNORE).all() and (row.label_codes[padding] == IGNORE).all()
    assert (row.sources[padding] == -1).all() and (row.text_ids[padding] == -1).all()
    assert (row.codes[padding] == -1).all() and (row.draws[padding] == 0).all()
    assert {name: getattr(row, name).dtype for name in ("draws", "speech_kinds", "speech_cu_seqlens", "codes")} == {
        "draws": torch.float32,
        "speech_kinds": torch.uint8,
        "speech_cu_seqlens": torch.int32,
        "codes": torch.int64,
    }


def test_a_state_of_another_sample_can_be_read_by_none(tokenizer, tokenizer_folder):
    data, parts = data_of(tokenizer_folder), files(5, sounds=(0.5,))
    pieces = [sequence_of(ASKED, parts, tokenizer, data, INTERLEAVED) for _ in range(2)]
    pieces[0].plan.sources[3] = 4  # the first of the other's
    with pytest.raises(AssertionError, match="another sequence's state"):
        pack_speech(pieces, row_tokens=96, speech_row_tokens=96, alignment=16, padding_token=9)


def test_stored_states_take_the_thinkers_place(tokenizer, tokenizer_folder):
    data, parts = data_of(tokenizer_folder, states=States.stored), files(5, sounds=(0.5,))
    states = np.random.default_rng(7).random((4, STATE)).astype(np.float16)
    stored = sequence_of(ASKED, parts | {"states.npy": array_file(states)}, tokenizer, data, INTERLEAVED)
    alone = sequence_of(SAID, parts, tokenizer, data, INTERLEAVED)  # there is nothing to store
    row = kind_of("speech").row_maker(tokenizer, data)([stored, alone, stored])
    assert row.tokens.shape == (0,) and row.cu_seqlens.tolist() == [0] and row.position_ids.shape == (3, 0)
    assert row.mel.shape[0] == 0 and row.context.shape == (0,)
    assert torch.equal(row.states, torch.from_numpy(np.concatenate([states, states])).float())
    assert row.sources[row.sources >= 0].tolist() == [*range(8)]
    assert row.without_media().states.shape == (0, 0)
    live = sequence_of(ASKED, parts, tokenizer, data_of(tokenizer_folder), INTERLEAVED)
    assert np.array_equal(live.plan.sources, stored.plan.sources)


LENGTHS = [6 + 7 * n % 50 for n in range(37)]


def sample(n: int) -> tuple[str, dict, dict]:
    """Sample n says its number, in an answer to a question that tells it too, or in a document."""
    seconds = 0.1 + 0.05 * (n % 20)
    fields: dict = {"text": f"{n:02d}", "speech": "0.wav"}
    if n % 3:
        question = heard(seconds, f"{n:02d}")
        fields = {"messages": [question, {"role": "assistant", "content": f"{n:02d}"}], "speech": "0.wav"}
    fields["voice"] = {"name": "anna"} | ({"speech": "1.wav", "description": "7"} if n % 2 else {})
    found = files(LENGTHS[n], sounds=(seconds,) if n % 3 else (), reference=4 if n % 2 else 0, first=n)
    return f"s-{n:04d}", fields, found | ({"1.wav": wave_file(4)} if n % 2 else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoken")
    samples = [sample(n) for n in range(37)]
    write_shards(folder, "train", [*samples[:29], ("s-9999", {"text": "nobody says this"})], 2)
    write_shards(folder, "val", samples[29:], 1)
    index_shards(folder)
    (folder / "codec.json").write_text(json.dumps({"codec": "a" * 64, "shards": {}}))
    return folder


@pytest.fixture
def data(folder: Path, tokenizer_folder: Path):
    mixture = [SpeechScheduleConfig(kind) for kind in ScheduleKind]
    settings = dict(row_tokens=256, schedules=mixture, voice_reference=0.5, voice_description=0.5)
    data = data_of(tokenizer_folder, **settings)
    return dataclasses.replace(data, sources=[SourceConfig(str(folder))], codec="a" * 64)


def spans(boundaries: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(boundaries.tolist()))


def digits(tokenizer: Tokenizer, tokens: torch.Tensor) -> str:
    return "".join(filter(str.isdigit, tokenizer.decode(tokens[tokens >= 0].tolist())))


def numbers(row: SpeechRow, tokenizer: Tokenizer) -> list[int]:
    """Number of each sample of the row, as its answer says it; its states and its frames have to be its own."""
    found = []
    owners = torch.bucketize(row.context, row.cu_seqlens[1:].long(), right=True)
    for begin, end in spans(row.speech_cu_seqlens):
        own = slice(begin, end)
        if row.speech_padding[begin]:
            continue
        number = int(digits(tokenizer, row.text_ids[own])[-2:])
        found.append(number)
        speaks = row.speech_kinds[own] == SpeechRow.KINDS.index("speech")
        answer = row.codes[own][speaks][-LENGTHS[number] :]
        assert torch.equal(answer, torch.from_numpy(codes(LENGTHS[number], first=number).T.astype(np.int64)))
        labels, whole = row.speech_labels[own], row.label_codes[own, 0] != IGNORE
        predicted = torch.cat([labels[whole][:, None], row.label_codes[own][whole]], 1)
        assert torch.equal(predicted, answer)
        sources = row.sources[own][row.sources[own] >= 0]
        assert (len(sources) > 0) == (number % 3 > 0)
        if len(sources):
            (owner,) = set(owners[sources].tolist())
            question = row.tokens[row.cu_seqlens[owner] : row.cu_seqlens[owner + 1]]
            assert int(digits(tokenizer, question)) == number
    return found


def test_rows_hold_samples_whole_within_both_bounds(data, tokenizer):
    rows = take(build_loader(data, INTERLEAVED, seed=SEED), 40)
    for row in rows:
        assert row.tokens.shape == (192,) and row.text_ids.shape == (256,)
        for bounds, length in ((row.cu_seqlens, 192), (row.speech_cu_seqlens, 256)):
            assert bounds[0] == 0 and bounds[-1] == length and (bounds % 16 == 0).all()
        assert len(numbers(row, tokenizer)) == row.samples > 0
    seen = collections.Counter(number for row in rows for number in numbers(row, tokenizer))
    assert set(seen) == set(range(29))
    filled = [float((~row.speech_padding).float().mean()) for row in rows]
    assert sum(filled) / len(filled) > 0.6
    assert sum((collections.Counter(row.skipped) for row in rows), collections.Counter())["no_speech"] > 0
    heard_again = [
        row for row in rows if (row.speech_kinds == SpeechRow.KINDS.index("control")).sum() > row.samples * 2
    ]
    assert heard_again  # references are drawn
    assert 0.4 < float(torch.cat([row.draws[~row.speech_padding] for row in rows]).mean()) < 0.6


def test_a_row_of_the_thinker_bounds_the_row_as_well(data):
    data.row_tokens = 48
    for row in take(build_loader(data, INTERLEAVED, seed=SEED), 20):
        assert row.tokens.shape == (48,) and row.cu_seqlens[-1] == 48


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 23])
def test_a_restored_loader_goes_on_with_the_same_speech(data, workers, taken):
    data.workers = workers
    loader = build_loader(data, INTERLEAVED, seed=SEED)
    take(loader, taken)
    state = through_a_file(loader.state_dict())
    expected = take(loader, 20)
    loader.close()
    restored = build_loader(data, INTERLEAVED, seed=SEED)
    restored.load_state_dict(state)
    assert_same(take(restored, 20), expected)
    restored.close()


def test_another_epoch_draws_anew_and_held_out_rows_do_not(data, tokenizer):
    rows = take(build_loader(data, INTERLEAVED, seed=SEED), 60)
    streams = collections.defaultdict(set)
    for row in rows:
        for (begin, end), number in zip(spans(row.speech_cu_seqlens), numbers(row, tokenizer), strict=False):
            streams[number].add(tuple(row.speech_kinds[begin:end].tolist()))
    assert all(len(drawn) > 1 for drawn in streams.values())
    held_out = evaluation_rows(data, INTERLEAVED, rows=3)
    assert_same(held_out, evaluation_rows(data, INTERLEAVED, rows=3))
    assert all((row.draws == 0).all() for row in held_out)
    data.speech.schedules = data.speech.schedules[:1]
    data.speech.voice_reference = data.speech.voice_description = 0.9
    assert_same(held_out, evaluation_rows(data, INTERLEAVED, rows=3))


@pytest.mark.parametrize("model", [INTERLEAVED, DUAL], ids=["interleaved", "dual_track"])
def test_a_prompt_is_the_stream_before_the_answer(data, tokenizer, model):
    prompts = held_out_prompts(data, model, EvaluationConfig(samples=100))
    assert [prompt.text for prompt in prompts] == [str(n) for n in range(29, 37)]
    for n, prompt in enumerate(prompts, 29):
        _, fields, parts = sample(n)
        whole = sequence_of(fields, parts, tokenizer, data, model)
        length = len(prompt.plan)
        assert len(whole) == length + LENGTHS[n] + (0 if model is DUAL else len(prompt.tokens) + 1)
        for name in ("kinds", "text_ids", "sources", "codes"):
            assert np.array_equal(getattr(prompt.plan, name), getattr(whole.plan, name)[:length]), name
        if model is DUAL:
            assert np.array_equal(prompt.rotary_ids, whole.rotary_ids[:, :length])
        assert (prompt.plan.labels == IGNORE).all() and (prompt.plan.label_codes == IGNORE).all()
        assert prompt.tokens == tokenizer.encode(prompt.text) and prompt.frames == LENGTHS[n]
        assert np.array_equal(prompt.codes, codes(LENGTHS[n], first=n))
        assert len(prompt.waveform) == LENGTHS[n] * 120
        assert (prompt.reference is not None) == (model is INTERLEAVED and n % 2 == 1)
        assert np.array_equal(prompt.positions, whole.positions)
        assert (prompt.thinker is None) == (n % 3 == 0)
    shares = [
        held_out_prompts(data, model, EvaluationConfig(samples=100), data_rank=r, data_world_size=3) for r in range(3)
    ]
    assert sorted(each.name for share in shares for each in share) == sorted(each.name for each in prompts)


def recipe_of(model: ModelConfig = INTERLEAVED, **speech):
    recipe = load_recipe(["data.rows=speech"])
    recipe.model, recipe.data.codec = dataclasses.replace(model), "a" * 64
    for key, value in speech.items():
        setattr(recipe.data.speech, key, value)
    return recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(dataclasses.replace(INTERLEAVED, talker=None)), "data.rows=speech: without model.talker"),
        (recipe_of(dataclasses.replace(INTERLEAVED, code2wav=None)), "model.code2wav=None: tells how long a frame"),
        (recipe_of(row_tokens=1000), "data.speech.row_tokens=1000: not a multiple of data.alignment=16"),
        (
            recipe_of(states=States.none, context=Context.all),
            "data.speech.context=all: has no meaning with data.speech",
        ),
        (
            recipe_of(DUAL, switch_label=SwitchLabel.code),
            "data.speech.switch_label=code: has no meaning with model.talker",
        ),
        (recipe_of(DUAL, voice_description=0.5), "data.speech.voice_description=0.5: has no meaning with model.talker"),
        (
            recipe_of(dataclasses.replace(DUAL, talker=dataclasses.replace(DUAL.talker, speaker_ids={}))),
            "model.talker.speaker_ids={}: dual_track speaks",
        ),
        (
            recipe_of(dataclasses.replace(DUAL, talker=dataclasses.replace(DUAL.talker, num_code_groups=4))),
            "model.talker.num_code_groups=4: model.code2wav.num_quantizers is 3",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(recipe, message):
    with pytest.raises(UserError) as refused:
        check_rows(recipe)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_recipe_of_speech_is_accepted_and_needs_codes():
    for recipe in (recipe_of(), recipe_of(DUAL), recipe_of(states=States.none)):
        check_rows(recipe)
        recipe.data.loss_on = LossOn.all
        with pytest.raises(UserError, match=r"^data\.loss_on=all: "):
            check_rows(recipe)
        recipe.data.codec = None
        with pytest.raises(UserError, match=r"^data\.codec=None: the Talker learns codes"):
            check_rows(recipe)


def test_a_tokenizer_without_the_talkers_tokens_is_refused(data, tmp_path):
    spec = json.loads((Path(data.tokenizer) / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<tts_text_eod>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert "<tts_text_eod>" in CONTROL_TOKENS and kind_of("speech").warning(data) is None
    with pytest.raises(UserError, match="no token <tts_text_eod>"):
        kind_of("speech").warning(dataclasses.replace(data, tokenizer=str(tmp_path)))
