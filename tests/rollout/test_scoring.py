"""Answers are scored by what was asked."""

from __future__ import annotations

import pytest

from omni_train.recipe.schema import Normalizer
from omni_train.rollout import scoring
from omni_train.rollout.scoring import Tally, score


def tallied(*answers, normalizer=Normalizer.basic) -> Tally:
    """The tally of (task, language, reference, answer) each."""
    tally = Tally()
    for task, language, reference, answer in answers:
        score(tally, {"task": task, "language": language}, reference, answer, normalizer)
    return tally


def metrics(*answers, **options):
    return tallied(*answers, **options).metrics()


def test_word_errors_are_per_word_of_all_references_of_a_language():
    found = metrics(
        ("transcribe", "en", "The red boat.", "the red boat"),
        ("transcribe", "en", "One two three four five six seven", "one too three four five six seven eight"),
        ("transcribe", "de", "Das Boot", ""),
    )
    assert found["wer_en"] == pytest.approx(2 / 10)
    assert found["wer_de"] == 1
    assert found["answers_transcribe"] == 3


def test_languages_without_spaces_have_character_errors_alone():
    found = metrics(
        ("transcribe", "zh", "今天 天气很好。", "今天天汽很好"), ("transcribe", "ja", "ありがとう", "ありがと")
    )
    assert found["cer_zh"] == pytest.approx(1 / 6)
    assert found["cer_ja"] == pytest.approx(1 / 5)
    assert not any(name.startswith("wer") for name in found)


@pytest.mark.parametrize(
    "language", ["zh_CN", "ZH", "cmn", "cmn_hans_cn", "ja_jp", "yue_hant_hk", "th_th", "zh-Hans", "lo_la"]
)
def test_they_have_no_word_errors_by_any_of_their_tags_and_none_in_the_pool(language):
    tally = tallied(
        ("transcribe", language, "今天天气很好我们去公园", "今天天气很好我们去公司"), ("transcribe", "en", "a b", "a")
    )
    found = tally.metrics()
    assert [name for name in found if name.startswith("wer_")] == ["wer_en"]
    (cer,) = (value for name, value in found.items() if name.startswith("cer_") and name != "cer_en")
    assert cer == pytest.approx(1 / 11)
    assert tally.pooled("wer") == pytest.approx(1 / 2)


def test_one_language_has_one_name_among_the_metrics():
    found = metrics(*(("transcribe", tag, "red boat", "red") for tag in ("en", "EN", "en_US", "eng")))
    assert set(found) == {"answers_transcribe", "cer_en", "wer_en"}


@pytest.mark.parametrize("language", ["Chinese", "zh CN", 7, None, "und"])
def test_words_of_a_language_that_is_not_known_are_not_counted_and_that_is_told(language):
    found = metrics(("transcribe", language, "今天天气", "今天天汽"), ("transcribe", "en", "a", "a"))
    assert found["unknown_language"] == 1
    assert found["cer_unknown"] == pytest.approx(1 / 4)
    assert {name for name in found if name.startswith("wer")} == {"wer_en"}


def test_a_number_with_a_separator_is_one_word_where_the_recipe_says_so():
    said = ("transcribe", "en", "1,000 boats", "1000 boats")
    assert metrics(said)["wer_en"] == 1 / 2
    pytest.importorskip("whisper_normalizer")
    assert metrics(said, normalizer=Normalizer.whisper)["wer_en"] == 0


def test_exact_match_by_task_forgives_case_punctuation_and_spaces():
    found = metrics(
        ("color", "en", "red", " Red. "),
        ("color", "en", "red", "blue"),
        ("shape", "en", "a circle", "a  circle"),
        (None, "en", "3.5", "35"),
        (None, "en", "-5", "5"),
        (None, "en", "50 %", "50"),
    )
    assert (found["exact_color"], found["exact_shape"], found["exact_answer"]) == (0.5, 1, 0)


def test_times_are_compared_in_seconds_and_what_is_no_time_is_wrong():
    found = metrics(
        ("when", "en", "At 4.0 seconds", "4.5 seconds"),
        ("when", "en", "7", "at 10,5"),
        ("when", "en", "2.0", "in the beginning"),
        ("when", "en", "75", "1:15"),
        ("when", "en", "1234", "1,234 seconds"),
    )
    assert found["when_seconds_error"] == pytest.approx((0.5 + 3.5) / 4)
    assert found["when_close"] == pytest.approx(3 / 5)
    assert (found["when_unparsable"], found["answers_when"]) == (1, 5)


def test_an_error_in_seconds_of_no_number_at_all_is_left_out():
    found = metrics(("when", "en", "2.0", "never"))
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
    assert together.metrics() == metrics(*answers)
    assert together.metrics()["exact_color"] == pytest.approx(2 / 3)


def test_an_empty_reference_is_no_division_by_zero():
    assert "wer_en" not in metrics(("transcribe", "en", "", "noise"))


def test_a_task_of_any_text_is_a_name():
    assert set(metrics(("what | is\nit", "en", "a", "a"))) == {"answers_what_is_it", "exact_what_is_it"}


def test_a_task_of_ones_own_is_scored_by_its_own_function(monkeypatch):
    def rhymes(tally, meta, reference, answer, normalizer):
        tally.add("rhymes", answer[-meta.get("letters", 2) :] == reference[-meta.get("letters", 2) :], 1)

    monkeypatch.setattr(scoring, "_TASKS", dict(scoring._TASKS))
    scoring.register("a rhyme", rhymes)
    found = metrics(("a rhyme", "en", "boat", "goat"), ("a rhyme", "en", "boat", "tree"), ("color", "en", "red", "red"))
    assert found == {"answers_a_rhyme": 2, "rhymes": 0.5, "answers_color": 1, "exact_color": 1}
    for taken in ("a rhyme", "a_rhyme", "transcribe"):
        with pytest.raises(ValueError, match="is registered already"):
            scoring.register(taken, rhymes)


def test_tasks_of_plug_ins_are_there_when_the_first_answer_is_scored(tmp_path, monkeypatch):
    from omni_train import plugins

    register = (
        "from omni_train.rollout.scoring import register\nregister('rhyme', lambda tally, *_: tally.add('sung', 1))"
    )
    (tmp_path / "rhyming_plugin.py").write_text(register)
    monkeypatch.setattr(scoring, "_TASKS", dict(scoring._TASKS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "rhyming_plugin")
    plugins.load.cache_clear()
    try:
        assert metrics(("rhyme", "en", "boat", "goat")) == {"answers_rhyme": 1, "sung": 1}
    finally:
        plugins.load.cache_clear()
