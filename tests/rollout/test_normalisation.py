"""What two writers may write differently is one, and different answers stay different."""

from __future__ import annotations

import pytest

from omni_train.recipe.schema import Normalizer
from omni_train.rollout.normalisation import answer_form, transcript_form


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("red", " Red. "),
        ("a circle", "a  circle"),
        ("red", "“Red!”"),
        ("-5", "−5"),
        ("50%", "50 %"),
        ("3–5", "3-5"),
        ("we're", "we’re"),
        ("５", "5"),
        ("红色", "红色。"),
        ("qué", "¿Qué?"),
        ("1/2", "1/2."),
    ],
)
def test_answers_that_differ_in_case_spaces_and_clause_marks_are_the_same(one, other):
    assert answer_form(one) == answer_form(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("-5", "5"), ("50 %", "50"), ("3.5", "35"), (".5", "5"), ("1/2", "12"), ("½", "12"), ("1,5", "15")),
        *(("C#", "C"), ("C++", "C"), ("$5", "5"), ("we're", "were"), ("can't", "cant"), ("5!", "5"), ("5'", "5")),
        *(("2²", "22"), ("5½", "51/2"), ("[0,1)", "(0,1]"), ("?", "!"), ("<", ">"), ("10:30", "1030")),
    ],
)
def test_different_answers_stay_different(one, other):
    assert answer_form(one) != answer_form(other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5, ok?", "it's 3.5 ok"),
        ("we’re", "we're"),
        ('\'tis "so"', "tis so"),
        ("well-known", "well known"),
        ("ＡＢＣ", "abc"),
        ("हिन्दी", "हिन्दी"),
        ("-5 or 50 % of $5", "-5 or 50% of $5"),
        ("1,000 x-5", "1,000 x 5"),
        ("...", ""),
    ],
)
def test_a_basic_transcript_has_words_and_numbers(text, expected):
    assert transcript_form(text, "fr", Normalizer.basic) == expected


def test_numbers_written_in_two_ways_are_one_word_as_whisper_writes_english():
    pytest.importorskip("whisper_normalizer")
    for text in ("1,000 boats", "1000 boats", "One thousand boats."):
        assert transcript_form(text, "en", Normalizer.whisper) == "1000 boats"
        assert transcript_form(text, "fr", Normalizer.whisper) == transcript_form(text, "fr", Normalizer.basic)
    assert transcript_form("1,000 boats", "en", Normalizer.basic) == "1,000 boats"
