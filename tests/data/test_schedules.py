"""Schedules of interleaved streams: ARIA's rule at every prefix, in training and in generation."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from omni_train.data.rows.schedules import Feeder, Step, drawable, drawn_schedule, runs_of
from omni_train.recipe.schema import ScheduleKind, SpeechScheduleConfig, SwitchLabel, TalkerConfig, TalkerStyle


def schedule(kind: str, **settings) -> SpeechScheduleConfig:
    return SpeechScheduleConfig(kind=ScheduleKind(kind), **settings)


def drawn(generator: random.Random) -> SpeechScheduleConfig:
    kind = generator.choice(list(ScheduleKind))
    numbers = {name: generator.choice([1, 2, 3, 4, 7, 40]) for name in ("lead", "text", "frames")}
    return schedule(kind, **numbers)


def stream(runs: list[tuple[int, int]]) -> str:
    return "".join("T" * text + "S" * frames for text, frames in runs)


def test_every_schedule_keeps_the_rule_at_every_prefix_and_all_of_both():
    generator = random.Random(53)
    for _ in range(10_000):
        tokens, frames = generator.randrange(41), generator.choice([0, 1, 2, generator.randrange(160)])
        chosen = drawn(generator)
        runs = runs_of(chosen, tokens, frames)
        assert (sum(text for text, _ in runs), sum(frames for _, frames in runs)) == (tokens, frames)
        n = m = 0
        for symbol in stream(runs):
            n, m = n + (symbol == "T"), m + (symbol == "S")
            assert m * tokens <= n * frames, (chosen, tokens, frames, runs)
        assert all(text > 0 for text, _ in runs[1:]) and all(frames > 0 for _, frames in runs[:-1])
        assert all(runs[-1:]) and (not frames or not runs or runs[-1][1] > 0)  # the last frame is behind all text


def test_the_tightest_says_each_frame_as_soon_as_the_rule_allows():
    assert runs_of(schedule("tightest"), 5, 18) == [(1, 3), (1, 4), (1, 3), (1, 4), (1, 4)]
    generator = random.Random(59)
    for _ in range(500):
        tokens, frames = generator.randrange(1, 30), generator.randrange(60)
        fed = spoken = 0
        for text, said in runs_of(schedule("tightest"), tokens, frames):
            for _ in range(text):  # where one more frame had been allowed it would have come
                assert (spoken + 1) * tokens > fed * frames
                fed += 1
            spoken += said
            assert spoken == fed * frames // tokens


@pytest.mark.parametrize(
    ("chosen", "tokens", "frames", "expected"),
    [
        (schedule("tightest"), 4, 2, "TTSTTS"),  # M < N
        (schedule("tightest"), 3, 0, "TTT"),
        (schedule("tightest"), 0, 3, "SSS"),
        (schedule("tightest"), 0, 0, ""),
        (schedule("tightest"), 1, 3, "TSSS"),
        (schedule("lead", lead=2), 5, 10, "TTTSSTSSTSSSSSS"),
        (schedule("lead", lead=9), 3, 4, "TTTSSSS"),  # a lead beyond the text
        (schedule("turns", text=2, frames=3), 4, 10, "TTSSSTTSSSSSSS"),  # the text ends where a turn does
        (schedule("turns", text=2, frames=3), 5, 10, "TTSSSTTSSSTSSSS"),
        (schedule("turns", text=4, frames=4), 10, 7, "TTTTSSTTTTSSSTTSS"),  # 2.8 and 5.6 are allowed, not 4 and 8
        (schedule("turns", text=4, frames=4), 3, 9, "TTTSSSSSSSSS"),  # shorter than a turn
        (schedule("text_first"), 3, 4, "TTTSSSS"),
    ],
)
def test_schedules_are_as_written_by_hand(chosen, tokens, frames, expected):
    assert stream(runs_of(chosen, tokens, frames)) == expected


def test_a_mixture_is_drawn_by_its_weights_and_the_same_again():
    mixture = [schedule("tightest", weight=1.0), schedule("text_first", weight=3.0)]
    kinds = [drawn_schedule(mixture, np.random.default_rng(seed)).kind for seed in range(400)]
    assert 260 < kinds.count(ScheduleKind.text_first) < 340
    assert kinds == [drawn_schedule(mixture, np.random.default_rng(seed)).kind for seed in range(400)]


def generated(chosen: SpeechScheduleConfig, tokens: int, frames: int, ratio: float | None) -> str:
    """Stream of a text that is there from the start, of so many frames."""
    feeder, found = Feeder(chosen, ratio), ""
    while found.count("S") < frames or "E" not in found:
        found += {Step.text: "T", Step.end: "E", Step.frame: "S"}[feeder.next(tokens, ended=True)]
    return found


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_a_text_that_is_there_is_fed_as_in_training(kind):
    """But frames that are due behind the last token: nobody knows in training that more would have come."""
    generator = random.Random(61)
    for _ in range(200):
        tokens, frames = generator.randrange(1, 30), generator.randrange(30, 120)
        numbers = {name: generator.randrange(1, 9) for name in ("lead", "text")}
        chosen = schedule(kind, **numbers, frames=generator.randrange(1, 1 + numbers["text"]))
        ratio = frames / tokens if kind in (ScheduleKind.tightest, ScheduleKind.lead) else None
        if ratio is not None and any(int(n * ratio) != n * frames // tokens for n in range(tokens)):
            continue  # the ratio is no binary fraction
        trained = stream(runs_of(chosen, tokens, frames))
        end = trained.rindex("T") + 1
        assert generated(chosen, tokens, frames, ratio) == trained[:end] + "E" + trained[end:]


def test_a_stream_does_not_depend_on_the_pieces_in_which_its_text_comes():
    generator = random.Random(71)
    for _ in range(300):
        tokens, chosen = generator.randrange(1, 30), drawn(generator)
        feeder, found, come, ended = Feeder(chosen, 3.5), "", 0, False
        while len(found) < 150:
            step = feeder.next(come, ended)
            if step is Step.wait:  # for what is still to come, and for nothing else
                assert not ended and feeder.fed == come
                come = min(tokens, come + generator.randrange(4))
                ended = come == tokens and generator.random() < 0.5
            else:
                found += {Step.text: "T", Step.end: "E", Step.frame: "S"}[step]
        whole = generated(chosen, tokens, 150, 3.5)
        assert found == whole[:150] and found.count("T") == tokens


def test_more_text_is_waited_for_and_no_text_that_will_not_come():
    feeder = Feeder(schedule("turns", text=2, frames=3))
    arrivals = [(0, False), (1, False), (1, False), *[(5, False)] * 11, *[(5, True)] * 3]
    found = "".join(feeder.next(come, ended)[0] for come, ended in arrivals)
    # Two tokens and three frames, twice; of the fifth nobody knows yet whether the text goes on.
    assert found == "wtwtfff" + "ttfff" + "tw" + "eff"


def test_text_first_waits_for_all_of_it_and_a_ratio_is_asked_for():
    feeder = Feeder(schedule("text_first"))
    steps = [feeder.next(come, ended) for come, ended in [(1, False), (1, False), (2, False), (2, True), (2, True)]]
    assert steps == [Step.text, Step.wait, Step.text, Step.end, Step.frame]
    with pytest.raises(ValueError, match="kind=lead is generated with a ratio"):
        Feeder(schedule("lead"))


TALKER = dict(codebook_size=20, codec_vocab_size=30, codec_eos_id=22, codec_text_id=25)


@pytest.mark.parametrize(("style", "label", "ended"), [*itertools.product(TalkerStyle, SwitchLabel, (False, True))])
def test_what_may_be_drawn(style, label, ended):
    ids = drawable(TalkerConfig(style=style, **TALKER), label, text_ended=ended)
    assert ids.dtype == bool and ids.shape == (30,) and ids[:20].all()
    interleaved = style is TalkerStyle.interleaved
    expected = {22} if ended or not interleaved else {25} if label is SwitchLabel.code else set()
    assert set(20 + np.flatnonzero(ids[20:])) == expected
