"""Streams of the Talker in both styles, position by position."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.chats import prompt
from omni_train.data.rows.speech_plans import Planner
from omni_train.data.samples.parsing import sample_of
from omni_train.recipe.schema import (
    ChatTemplate,
    Context,
    MediaConfig,
    Positions,
    ScheduleKind,
    SpeechScheduleConfig,
    States,
    SwitchLabel,
    TalkerStyle,
)
from tests.support.media import tone, video_file
from tests.support.sized_chats import model_with_encoders
from tests.support.spoken import (
    ANNA,
    BEN,
    BOS,
    EOS,
    NOTHINK,
    PAD,
    TEXT,
    THINK_BOS,
    THINK_EOS,
    codes,
    data_of,
    files,
    heard,
    model_of,
    sequence_of,
)

DUAL, INTERLEAVED = model_of(TalkerStyle.dual_track), model_of()


def told(sequence, tokenizer) -> list[tuple]:
    """(kind's first letter or "!" for control, text, source, code entering, label, whether residuals are predicted).

    Residual codes are checked against the first here: those of a frame are 20 and 40 more.
    """
    plan, found = sequence.plan, []
    for p in range(len(plan)):
        kind = SpeechRow.KINDS[plan.kinds[p]]
        entering, label, residual = plan.codes[p].tolist(), int(plan.labels[p]), plan.label_codes[p].tolist()
        frame = entering[0] < 20 and entering[0] >= 0
        assert entering[1:] == ([entering[0] + 20, entering[0] + 40] if frame else [-1, -1])
        assert residual in ([label + 20, label + 40], [IGNORE, IGNORE])
        text = "" if plan.text_ids[p] < 0 else tokenizer.decode([int(plan.text_ids[p])])
        letter = "!" if kind == "control" else kind[0]
        found.append((letter, text, int(plan.sources[p]), entering[0], label, residual[0] != IGNORE))
    return found


def text(*words: str) -> list[tuple]:
    return [("t", word, -1, -1, IGNORE, False) for word in words]


def states(first: int, last: int) -> list[tuple]:
    return [("c", "", k, -1, IGNORE, False) for k in range(first, last + 1)]


def frames(first: int, last: int) -> list[tuple]:
    """Frames that enter and teach nothing."""
    return [("s", "", -1, code % 20, IGNORE, False) for code in range(first, last + 1)]


def turn(tokenizer, role: str, body: list[tuple]) -> list[tuple]:
    return [*text(*head(tokenizer, role)), *body, *text("<|im_end|>", "\n")]


def head(tokenizer, role: str) -> list[str]:
    return ["<|im_start|>", *(tokenizer.decode([token]) for token in tokenizer.encode(f"{role}\n"))]


ENTERS_BOS = ("!", "", -1, BOS, IGNORE, False)
END = "<tts_text_eod>"


def answer(look_ahead_1: int, look_ahead_2: int) -> list[tuple]:
    """The stream of 3 tokens and 5 frames in the tightest schedule, by hand."""
    return [
        ENTERS_BOS,
        ("t", "1", -1, -1, 0, True),
        ("s", "", -1, 0, look_ahead_1, False),
        ("t", "2", -1, -1, 1, True),
        ("s", "", -1, 1, 2, True),
        ("s", "", -1, 2, look_ahead_2, False),
        ("t", "3", -1, -1, IGNORE, False),
        ("!", END, -1, -1, 3, True),
        ("s", "", -1, 3, 4, True),
        ("s", "", -1, 4, EOS, False),
    ]


@pytest.mark.parametrize(
    ("label", "ahead"),
    [(SwitchLabel.look_ahead, (1, 3)), (SwitchLabel.none, (IGNORE, IGNORE)), (SwitchLabel.code, (TEXT, TEXT))],
)
def test_an_interleaved_document(tokenizer, tokenizer_folder, label, ahead):
    data = data_of(tokenizer_folder, switch_label=label)
    sequence = sequence_of({"text": " 123\n"}, files(5), tokenizer, data, INTERLEAVED)
    assert told(sequence, tokenizer) == [*text(*head(tokenizer, "assistant")), *answer(*ahead)]
    assert sequence.rotary_ids is None and sequence.thinker is None and len(sequence.positions) == 0


@pytest.mark.parametrize(
    ("asked", "stream"),
    [
        (SpeechScheduleConfig(ScheduleKind.text_first), "tttEsssss"),
        (SpeechScheduleConfig(ScheduleKind.turns, text=2, frames=2), "ttsstEsss"),
        (SpeechScheduleConfig(ScheduleKind.lead, lead=1), "ttstEssss"),
    ],
)
def test_other_schedules_predict_each_frame_once_with_residuals(tokenizer, tokenizer_folder, asked, stream):
    data = data_of(tokenizer_folder, schedules=[asked])
    sequence = sequence_of({"text": "123"}, files(5), tokenizer, data, INTERLEAVED)
    found = told(sequence, tokenizer)[len(head(tokenizer, "assistant")) + 1 :]
    assert "".join("E" if word == END else kind for kind, word, *_ in found) == stream
    assert [label for *_, label, whole in found if whole] == [0, 1, 2, 3, 4]
    for (*_, label, whole), (kind, _, _, entering, _, _) in itertools.pairwise(found):
        assert whole == (kind == "s") and (not whole or label == entering)


def test_a_voice_is_described_and_heard_before(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder)
    voice = {"speech": "1.wav", "description": " 45 "}
    fields, parts = {"text": "123", "voice": voice}, files(5, reference=4)
    description = text("4", "5")
    sound = [ENTERS_BOS, *frames(11, 14), ("!", "", -1, EOS, IGNORE, False)]
    rest = [*text(*head(tokenizer, "assistant")), *answer(1, 3)]
    both = sequence_of(fields, parts, tokenizer, data, INTERLEAVED)
    assert told(both, tokenizer) == [*turn(tokenizer, "system", [*description, *sound]), *rest]
    data.speech.voice_reference = 0.0
    read = sequence_of(fields, parts, tokenizer, data, INTERLEAVED, seed=3, key=("k",))
    assert told(read, tokenizer) == [*turn(tokenizer, "system", description), *rest]
    data.speech.voice_reference, data.speech.voice_description = 1.0, 0.0
    data.speech.voice_seconds = 3 * 0.005
    cut = sequence_of(fields, parts, tokenizer, data, INTERLEAVED)
    assert told(cut, tokenizer) == [*turn(tokenizer, "system", [sound[0], *frames(11, 13), sound[-1]]), *rest]


TALK = {
    "messages": [
        {"role": "system", "content": "9"},
        heard(0.5, "8"),  # of 4 tokens
        {"role": "assistant", "content": "77"},
        heard(1.2),  # of 8
        {"role": "assistant", "content": "\n123 "},
        {"role": "user", "content": "never read"},
    ]
}
SOUNDS = (0.5, 1.2)


def thinker_text(sequence, tokenizer) -> str:
    return tokenizer.decode(sequence.thinker.tokens.tolist())


def test_interleaved_context_of_media(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder)
    sequence = sequence_of(TALK, files(5, sounds=SOUNDS), tokenizer, data, INTERLEAVED)
    assert told(sequence, tokenizer) == [
        *turn(tokenizer, "user", states(0, 3)),
        *turn(tokenizer, "user", states(4, 11)),
        *text(*head(tokenizer, "assistant")),
        *answer(1, 3),
    ]
    pads = sequence.thinker.tokens[sequence.positions]
    assert {tokenizer.decode([token]) for token in pads.tolist()} == {"<|audio_pad|>"}
    assert sequence.positions.tolist() == sequence.thinker.audio_slots.tolist()
    assert len(sequence.thinker) == sequence.positions[-1] + 1 == len(sequence.thinker.labels)
    assert (sequence.thinker.labels == IGNORE).all() and sequence.thinker.positions.shape == (3, len(sequence.thinker))
    assert [len(mel) for mel in sequence.thinker.mel] == [50, 120]
    said = thinker_text(sequence, tokenizer).replace("<|audio_pad|>", "")
    assert said == (
        "<|im_start|>system\n9<|im_end|>\n<|im_start|>user\n8<|audio_start|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\n77<|im_end|>\n<|im_start|>user\n<|audio_start|>"
    )


def test_interleaved_context_is_thinned_evenly_and_keeps_its_sounds_whole(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder, max_media_positions=3)
    sequence = sequence_of(TALK, files(5, sounds=SOUNDS), tokenizer, data, INTERLEAVED)
    slots = sequence.thinker.audio_slots
    assert sequence.positions.tolist() == slots[[0, 2, 3, 4, 8, 11]].tolist()
    data.speech.max_media_positions = 1
    one = sequence_of(TALK, files(5, sounds=SOUNDS), tokenizer, data, INTERLEAVED)
    assert one.positions.tolist() == slots[[0, 4]].tolist() and len(one.thinker) == slots[-1] + 1
    assert told(one, tokenizer)[: 2 * len(head(tokenizer, "user")) + 6] == [
        *turn(tokenizer, "user", states(0, 0)),
        *turn(tokenizer, "user", states(1, 1)),
    ]


def test_interleaved_context_of_all_positions_but_roles(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder, context=Context.all, max_media_positions=2)
    sequence = sequence_of(TALK, files(5, sounds=SOUNDS), tokenizer, data, INTERLEAVED)
    read = tokenizer.decode(sequence.thinker.tokens[sequence.positions].tolist())
    pads = "<|audio_start|><|audio_pad|><|audio_pad|><|audio_end|>"
    assert read == f"98{pads}77{pads}"
    assert told(sequence, tokenizer) == [
        *turn(tokenizer, "system", states(0, 0)),
        *turn(tokenizer, "user", states(1, 5)),
        *turn(tokenizer, "assistant", states(6, 7)),
        *turn(tokenizer, "user", states(8, 11)),
        *text(*head(tokenizer, "assistant")),
        *answer(1, 3),
    ]


def test_without_states_there_is_no_context(tokenizer, tokenizer_folder):
    for model, fields in ((INTERLEAVED, TALK), (DUAL, TALK | {"voice": {"name": "anna"}})):
        data = data_of(tokenizer_folder, states=States.none)
        sequence = sequence_of(fields, files(5), tokenizer, data, model)  # the sounds are not even there
        assert sequence.thinker is None and not (sequence.plan.sources >= 0).any()


def dual_answer(tokenizer, speaker: int) -> list[tuple]:
    """The answer of 3 tokens and 5 frames with both tracks, by hand."""
    return [
        *text(*head(tokenizer, "assistant")),
        ("!", "<tts_pad>", -1, NOTHINK, IGNORE, False),
        ("!", "<tts_pad>", -1, THINK_BOS, IGNORE, False),
        ("!", "<tts_pad>", -1, THINK_EOS, IGNORE, False),
        ("!", "<tts_pad>", -1, speaker, IGNORE, False),
        ("!", "<tts_text_bos>", -1, PAD, IGNORE, False),
        ("t", "1", -1, BOS, 0, True),
        ("s", "2", -1, 0, 1, True),
        ("s", "3", -1, 1, 2, True),
        ("s", END, -1, 2, 3, True),
        ("s", "<tts_pad>", -1, 3, 4, True),
        ("s", "<tts_pad>", -1, 4, EOS, False),
    ]


def test_a_document_with_both_tracks(tokenizer, tokenizer_folder):
    fields = {"text": "123", "voice": {"name": "ben"}}
    sequence = sequence_of(fields, files(5), tokenizer, data_of(tokenizer_folder), DUAL)
    assert told(sequence, tokenizer) == dual_answer(tokenizer, BEN)
    assert sequence.rotary_ids.tolist() == [[*range(len(sequence))]] * 3


def test_as_many_frames_as_tokens_are_enough_for_both_tracks(tokenizer, tokenizer_folder):
    fields = {"text": "123", "voice": {"name": "ben"}}
    sequence = sequence_of(fields, files(3), tokenizer, data_of(tokenizer_folder), DUAL)
    assert [row[1] for row in told(sequence, tokenizer)[-3:]] == ["2", "3", END]


@pytest.mark.parametrize("style", list(Positions))
def test_a_chat_with_both_tracks_has_its_users_turns_whole(tokenizer, tokenizer_folder, style):
    data = data_of(tokenizer_folder)
    data.media.positions = style
    sequence = sequence_of(
        TALK | {"voice": {"name": "anna"}}, files(5, sounds=SOUNDS), tokenizer, data, DUAL, seed=5, key=("k",)
    )
    first = [*text("8", "<|audio_start|>"), *states(0, 3), *text("<|audio_end|>")]
    second = [*text("<|audio_start|>"), *states(4, 11), *text("<|audio_end|>")]
    turns = [*turn(tokenizer, "user", first), *turn(tokenizer, "user", second)]
    assert told(sequence, tokenizer) == [*turns, *dual_answer(tokenizer, ANNA)]
    assert sequence.positions.tolist() == sequence.thinker.audio_slots.tolist()
    assert sequence.rotary_ids.shape == (3, len(sequence))
    assert (sequence.rotary_ids.dtype == np.float32) == (style is Positions.qwen3_omni)
    assert sequence.rotary_ids.tolist() == [[*range(len(sequence))]] * 3  # sound takes an id each


@pytest.mark.parametrize("style", list(Positions))
def test_rotary_ids_of_both_tracks_count_on_from_the_turns_that_are_left(tokenizer, tokenizer_folder, style):
    """A film's ids do not count on by one. The Thinker's are the same where it reads the same turns."""
    data = data_of(tokenizer_folder)
    data.row_tokens = data.speech.row_tokens = 512
    data.media = MediaConfig(positions=style, video_min_pixels=1024, audio_timestamp_seconds=[])
    model = dataclasses.replace(DUAL, vision=model_with_encoders().vision)
    frames = np.random.default_rng(3).integers(0, 255, (13, 64, 96, 3), dtype=np.uint8)
    film = {"role": "user", "content": [{"type": "video", "video": "2.mp4", "sound": True}]}
    said, spoken = {"role": "assistant", "content": "77"}, {"role": "assistant", "content": "123"}
    parts = files(5, sounds=SOUNDS) | {"2.mp4": video_file(frames, fps=7, sound=tone(1.5))}
    fields = {"messages": [film, said, heard(0.5, "8"), spoken], "voice": {"name": "anna"}}
    sequence = sequence_of(fields, parts, tokenizer, data, model)
    left = sample_of({"messages": [film, heard(0.5, "8"), spoken]})
    expected, _ = prompt(left, tokenizer, max_tokens=512, media=data.media, model=model, parts=parts)
    assert np.array_equal(sequence.rotary_ids[:, : len(expected)], expected.positions)
    assert sequence.rotary_ids.dtype == expected.positions.dtype
    rest = sequence.rotary_ids[:, len(expected) - 1 :]
    assert np.array_equal(rest, rest[:, :1] + np.arange(rest.shape[1]))
    tokens = np.where(sequence.plan.sources < 0, sequence.plan.text_ids, -1)[: len(expected)]
    media = np.sort(np.concatenate([expected.audio_slots, expected.vision_slots]))
    assert np.flatnonzero(tokens < 0).tolist() == media.tolist()
    assert np.array_equal(np.delete(tokens, media), np.delete(expected.tokens, media))
    own = np.sort(np.concatenate([sequence.thinker.audio_slots, sequence.thinker.vision_slots]))
    assert sequence.positions.tolist() == own.tolist()
    assert len(sequence.thinker.patches) == len(sequence.thinker.mel) - 1 == 1


def test_an_answer_is_spoken_without_its_thinking(tokenizer, tokenizer_folder):
    data = data_of(tokenizer_folder)
    data.chat_template = ChatTemplate.qwen3_5
    asked, thought = {"role": "user", "content": "8"}, "<think>\nwell\n</think>\n\n123 "
    for turn in ({"content": thought}, {"content": "123", "reasoning_content": "well"}):
        fields = {"messages": [asked, {"role": "assistant"} | turn]}
        sequence = sequence_of(fields, files(5), tokenizer, data, INTERLEAVED)
        assert told(sequence, tokenizer) == [*text(*head(tokenizer, "assistant")), *answer(1, 3)]


def test_edges_of_a_stream(tokenizer):
    """No sample has them, but a stream that is cut or generated may: no frames, no text, neither."""
    end, eos = tokenizer.token_id(END), EOS
    planner = Planner(INTERLEAVED.talker, tokenizer)
    for tokens, number, entering, labels in (
        ([7, 8], 0, [7, 8, end], [IGNORE, IGNORE, eos]),
        ([], 2, [end, 0, 1], [0, 1, eos]),
        ([], 0, [end], [eos]),
        ([7], 1, [7, end, 0], [IGNORE, 0, eos]),
    ):
        plan = planner.interleaved(tokens, codes(number).astype(np.int64), SpeechScheduleConfig())
        assert np.maximum(plan.text_ids, plan.codes[:, 0]).tolist() == entering
        assert plan.labels.tolist() == labels
        assert (plan.label_codes[:, 0] != IGNORE).tolist() == [0 <= label < 20 for label in labels]
    silent = Planner(DUAL.talker, tokenizer).dual_track([7, 8], codes(0).astype(np.int64), ANNA)
    assert silent.labels[-1] == EOS and (silent.labels[:-1] == IGNORE).all() and (silent.label_codes == IGNORE).all()


def test_codes_are_those_of_the_file(tokenizer, tokenizer_folder):
    sequence = sequence_of({"text": "123"}, files(7, first=5), tokenizer, data_of(tokenizer_folder), INTERLEAVED)
    entering = sequence.plan.codes[sequence.plan.kinds == SpeechRow.KINDS.index("speech")]
    assert entering.tolist() == codes(7, first=5).T.tolist()
