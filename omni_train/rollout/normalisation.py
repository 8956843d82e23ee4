"""Text normalisation before answers are compared: differences of spelling vanish, other answers stay different."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable

from omni_train.recipe.schema import Normalizer

_ALIKE = str.maketrans("−‐–’‘“”„", '---\'\'"""')  # variants of hyphen, apostrophe and quotation mark
_SPACED_SIGN = re.compile(r"(?<=\d)\s+(?=[%‰°])")
_RAISED = ("<super>", "<sub>", "<fraction>")  # 2² is not 22, nor 5½ 51/2
_CLOSING = ".,;:!?。、"
_OPENING = "¿¡"


def answer_form(text: str) -> str:
    """Normal form of an answer for exact match: lower case, single spaces, no quotation marks around it or marks that
    end a clause.

    All else stays: -5, 50%, .5, 1/2, $5, 5!, C# and "we're" are not 5, 50, 5, 12, C and "were".
    """
    text = _unified(text).strip()
    while len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return " ".join(map(_bare, text.split()))


def transcript_form(text: str, language: str, normalizer: Normalizer) -> str:
    """Normal form of a transcript for word error rates.

    Args:
        text: reference or hypothesis.
        language: ISO 639 code.
        normalizer: ``basic`` keeps lower-case letters, digits, apostrophes within words and the signs of numbers (3.5,
            10:30, -5, $5, 50%), with single spaces; ``whisper`` does so too, but writes English as Whisper's normalizer
            does (Radford et al. 2022, appendix C): 1,000 and "one thousand" are 1000, "we're" is "we are".
    """
    if normalizer is Normalizer.whisper and language == "en":
        return _whisper_english()(text)
    text = _unified(text)
    kept = (letter if _is_said(text, index) else " " for index, letter in enumerate(text))
    return " ".join("".join(kept).split())


@functools.cache
def _whisper_english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def _unified(text: str) -> str:
    """Lower-case text with one spelling of each character."""
    compatible = (
        letter if unicodedata.decomposition(letter).startswith(_RAISED) else unicodedata.normalize("NFKC", letter)
        for letter in text
    )
    text = unicodedata.normalize("NFC", "".join(compatible)).casefold()
    return _SPACED_SIGN.sub("", text.translate(_ALIKE))


def _bare(word: str) -> str:
    """A word without the punctuation of its clause, unless it is nothing but punctuation, or a factorial."""
    word = word.lstrip(_OPENING) or word
    bare = word.rstrip(_CLOSING)
    factorial = bare[-1:].isdecimal() and word.startswith("!", len(bare))
    return word if factorial or not bare else bare


def _is_said(text: str, index: int) -> bool:
    """Whether the character at `index` belongs to a word or a number."""
    letter, before, behind = text[index], text[max(index - 1, 0) : index], text[index + 1 : index + 2]
    category = unicodedata.category(letter)
    if category[0] not in "PS":
        return True
    if before.isdecimal() and (behind.isdecimal() or letter in "%‰°" or category == "Sc"):
        return True
    if letter == "'":
        return before.isalpha() and behind.isalpha()
    return behind.isdecimal() and not before.isalnum() and (letter in "-+." or category == "Sc")
