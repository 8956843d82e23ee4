"""An answer is spoken as its text comes: the same codes and sound however that comes, and as early as can be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from omni_train.recipe.schema import ScheduleKind, SpeechScheduleConfig, States, TalkerStyle
from tests.support import codec
from tests.support.speech import randomized
from tests.support.talker import CODEBOOKS, CODEWORDS, FakeTokenizer, small_talker

TEXT = np.random.default_rng(3).integers(0, 90, 13).tolist()
SCHEDULES = {
    "turns": SpeechScheduleConfig(ScheduleKind.turns, text=2, frames=3),
    "lead": SpeechScheduleConfig(ScheduleKind.lead, lead=3),
    "text_first": SpeechScheduleConfig(ScheduleKind.text_first),
    "dual_track": None,
}
ASKED = {"turns": 3, "lead": 5, "text_first": 13, "dual_track": 2}
"""Tokens of the text that have come when the first frame can: the next one after a turn, or its end, must be known."""


def spoken(rank, world_size, name, sizes, most=36):
    """How a text is spoken that comes in pieces of each of these sizes, piece by piece of sound and in one."""
    import torch

    from omni_train import platform
    from omni_train.data.rows.speech import stream_before
    from omni_train.data.rows.speech_context import Context
    from omni_train.data.rows.speech_plans import Planner
    from omni_train.models.codec import SpeechCodec
    from omni_train.models.talker import build_chunks
    from omni_train.rollout.conversation import SpokenAnswer
    from omni_train.rollout.speech import Prompt, Speaker, SpeechLimits, SpeechSampling
    from omni_train.rollout.waveform import WaveStream

    dual = name == "dual_track"
    style = TalkerStyle.dual_track if dual else TalkerStyle.interleaved
    recipe = small_talker(states=States.none, style=style)
    platform.parallel.initialize(recipe.parallel, 7)
    (model,) = build_chunks(recipe)
    model.eval()
    with torch.no_grad():
        model.codec_head.weight.mul_(20)
        model.codec_head.weight[recipe.model.talker.codec_eos_id] = 0  # it is seldom the end
    sizes_of = dict(num_quantizers=CODEBOOKS, codebook_size=CODEWORDS)
    code2wav = randomized(SpeechCodec(replace(codec.CODEC, **sizes_of), replace(codec.CODE2WAV, **sizes_of)))
    code2wav = code2wav.to_code2wav()
    planner = Planner(recipe.model.talker, FakeTokenizer())

    def begin(tokens):
        plan, ids = stream_before(planner, Context(), recipe.data, first=tokens[0], speaker=20, description="low")
        return Speaker(
            model,
            FakeTokenizer(),
            [Prompt(plan, ids, None, list(tokens), ended=False)],
            schedule=SCHEDULES[name],
            frames_per_token=1.5 if name == "lead" else None,
            sampling=SpeechSampling(seed=4),
            limits=SpeechLimits(max_frames=most),
        )

    outcomes = []
    for size in sizes:
        order: list[int] = []  # tokens of each piece of text, when it is asked for, and 0 for a piece of sound

        def text(size=size, order=order):
            for piece in itertools.batched(TEXT, size):
                order.append(len(piece))
                yield list(piece)

        answer, events = SpokenAnswer(text(), begin, WaveStream(code2wav, size), 24000), []
        for event in answer:
            events.append(event)
            order += [] if event.waveform is None else [0]
        codes = answer.speaker.speech[0].frames() if answer.speaker else np.zeros((CODEBOOKS, 0), np.int64)
        sound = [event.waveform for event in events if event.waveform is not None]
        whole = code2wav(torch.from_numpy(codes)[None])[0].detach().numpy() if codes.size else np.zeros(0)
        times = [event.seconds for event in events]
        outcomes.append((codes, np.concatenate([*sound, np.zeros(0)]), whole, order, times, answer.ending))
        assert [token for event in events for token in event.text] == TEXT
        assert answer.samples == len(outcomes[-1][1]) and answer.frames == codes.shape[1]
        first = [event.seconds for event in events if event.waveform is not None][:1]
        assert [answer.first_packet] == (first or [None])
    platform.parallel.destroy()
    return outcomes


@pytest.mark.parametrize("name", SCHEDULES)
def test_codes_and_sound_do_not_depend_on_the_pieces_of_the_text(distributed, name):
    """Nor the sound on the pieces of frames from which it is made; all of the text is written in any case."""
    (outcomes,) = distributed(1, spoken, name, [1, 3, 8])
    expected, sound, *_ = outcomes[-1]
    assert expected.shape[1] > 30 and len({tuple(frame) for frame in expected.T}) > 10
    for codes, streamed, whole, order, times, ending in outcomes:
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_allclose(streamed, whole, rtol=0, atol=1e-4)
        np.testing.assert_allclose(streamed, sound, rtol=0, atol=1e-4)
        assert sum(order) == len(TEXT) and times == sorted(times) and ending == outcomes[0][-1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_sound_comes_as_soon_as_the_schedule_lets_it(distributed, name):
    """Text is asked for while there is nothing to speak, and at no other time."""
    ((*_, order, _, _),) = distributed(1, spoken, name, [1])[0]
    assert order.index(0) == ASKED[name]
    if name == "turns":
        assert order[3:14] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]
    if name == "dual_track":
        assert order[:8] == [1, 1, 0, 1, 0, 1, 0, 1]


def test_text_is_written_to_its_end_when_speech_has_ended_before(distributed):
    (((codes, sound, _, order, _, ending),),) = distributed(1, spoken, "dual_track", [1], 5)
    assert (codes.shape[1], ending, sum(order)) == (5, "limit", len(TEXT))
    assert order[-5:] == [1] * 5


def nothing(rank, world_size):
    from omni_train.rollout.conversation import SpokenAnswer

    answer = SpokenAnswer([], None, None, 24000)
    return list(answer), answer.ending, answer.first_packet, answer.real_time_factor


def test_of_an_empty_text_nothing_is_spoken(distributed):
    assert distributed(1, nothing) == [([], "no text", None, 0.0)]
