"""Languages are known by any of their tags, and what is no tag is no language."""

from __future__ import annotations

import pytest

from omni_train.data.samples.language import UNKNOWN, Language, language_of


@pytest.mark.parametrize(
    ("tag", "code", "spaced"),
    [
        *((tag, "zh", False) for tag in ("zh", "zh-CN", "zh_CN", "ZH", " zh ", "zho", "cmn", "cmn_hans_cn", "zh-Hant")),
        *((tag, "ja", False) for tag in ("ja", "ja_jp", "jpn")),
        *((tag, "th", False) for tag in ("th_th", "tha")),
        ("yue_hant_hk", "yue", False),
        ("nan", "nan", False),
        ("lo_la", "lo", False),
        ("km", "km", False),
        ("my_mm", "my", False),
        ("bo", "bo", False),
        *((tag, "en", True) for tag in ("en", "en_US", "EN", "eng")),
        ("pt-BR", "pt", True),
        ("ko_kr", "ko", True),
        ("vi", "vi", True),
        ("zh-Latn-pinyin", "zh", True),
    ],
)
def test_a_language_is_known_by_any_of_its_tags_and_its_script_says_whether_words_are_spaced(tag, code, spaced):
    assert language_of({"language": tag}) == Language(code, spaced)


@pytest.mark.parametrize("meta", [{}, {"language": None}, {"language": " "}, {"language": "unknown"}])
def test_none_that_is_named_is_unknown(meta):
    assert language_of(meta) == Language(UNKNOWN, None)


@pytest.mark.parametrize("tag", ["und", "mul", "zxx", "x-ours"])
def test_a_tag_of_no_one_language_is_unknown(tag):
    assert language_of({"language": tag}) == Language(UNKNOWN, None)


@pytest.mark.parametrize("named", ["Chinese", "zh_CN.UTF-8", "en|de", "en\n", "qq", "z", 7, ["en"], "a" * 500])
def test_what_is_no_tag_is_not_understood_and_nothing_is_guessed(named):
    found = language_of({"language": named})
    assert found == (Language("en", True) if named == "en\n" else Language(UNKNOWN, None, understood=False))
