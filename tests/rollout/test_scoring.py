"""Answers are scored by what was asked."""

from __future__ import annotations

import pytest

from omni_train.rollout.scoring import Tally, normalise, number, score


def figures(*answers):
    """Figures of (task, language, reference, answer) each."""
    tally = Tally()
    for task, language, reference, answer in answers:
        score(tally, {"task": task, "language": language}, reference, answer)
    return tally.figures()


def test_word_errors_are_per_word_of_all_references_of_a_language():
    found = figures(
        ("transcribe", "en", "The red boat.", "the red boat"),
        ("transcribe", "en", "One two three four five six seven", "one too three four five six seven eight"),
        ("transcribe", "de", "Das Boot", ""),
    )
    assert found["wer_en"] == pytest.approx(2 / 10)
    assert found["wer_de"] == 1
    assert found["answers_transcribe"] == 3


def test_languages_without_spaces_have_character_errors_alone():
    found = figures(
        ("transcribe", "zh", "今天 天气很好。", "今天天汽很好"), ("transcribe", "ja", "ありがとう", "ありがと")
    )
    assert found["cer_zh"] == pytest.approx(1 / 6)
    assert found["cer_ja"] == pytest.approx(1 / 5)
    assert not any(name.startswith("wer") for name in found)


def test_exact_match_by_task_forgives_case_punctuation_and_spaces():
    found = figures(
        ("color", "en", "red", " Red. "),
        ("color", "en", "red", "blue"),
        ("shape", "en", "a circle", "a  circle"),
        (None, "en", "3.5", "35"),
    )
    assert (found["exact_color"], found["exact_shape"], found["exact_answer"]) == (0.5, 1, 0)


def test_times_are_compared_in_seconds_and_what_is_no_time_is_wrong():
    found = figures(
        ("when", "en", "At 4.0 seconds", "4.5 seconds"),
        ("when", "en", "7", "at 10,5"),
        ("when", "en", "2.0", "in the beginning"),
    )
    assert found["when_seconds_error"] == pytest.approx((0.5 + 3.5) / 2)
    assert found["when_close"] == pytest.approx(1 / 3)
    assert (found["when_unparsable"], found["answers_when"]) == (1, 3)


def test_an_error_in_seconds_of_no_number_at_all_is_left_out():
    found = figures(("when", "en", "2.0", "never"))
    assert "when_seconds_error" not in found
    assert (found["when_close"], found["when_unparsable"]) == (0, 1)


def test_tallies_of_ranks_add_up():
    answers = [
        ("color", "en", "red", "red"),
        ("color", "en", "red", "tan"),
        ("when", "en", "3", "4"),
        ("color", "en", "a", "a"),
    ]
    together = Tally()
    for part in (answers[:1], answers[1:3], answers[3:]):
        tally = Tally()
        for task, language, reference, answer in part:
            score(tally, {"task": task, "language": language}, reference, answer)
        together += tally
    assert together.figures() == figures(*answers)
    assert together.figures()["exact_color"] == pytest.approx(2 / 3)


def test_an_empty_reference_is_no_division_by_zero():
    assert "wer_en" not in figures(("transcribe", "en", "", "noise"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("It's 3.5, ok?", "its 3.5 ok"), ("well-known", "well known"), ("ＡＢＣ", "abc"), ("हिन्दी", "हिन्दी"), ("...", "")],
)
def test_normalised_text(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("about 12.5s", 12.5), ("0,5", 0.5), ("none", None), ("３ seconds", 3.0)]
)
def test_the_first_number_of_a_text(text, expected):
    assert number(text) == expected
