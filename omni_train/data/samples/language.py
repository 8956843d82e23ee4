"""Languages by their tags: ``zh``, ``ZH``, ``zh_CN``, ``zho`` and ``cmn-Hans-CN`` are one language."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import langcodes

UNKNOWN = "unknown"
LONGEST_TAG = 256  # characters; what was read is kept

# Scripts in which no space stands between words: Chinese characters and kana, and those of class SA (complex context)
# of Unicode's line breaking, UAX 14, with Tibetan, Javanese and Balinese.
UNSPACED = {
    *("Hans", "Hant", "Hani", "Jpan", "Hira", "Kana", "Hrkt", "Bopo"),
    *("Thai", "Laoo", "Khmr", "Mymr", "Tale", "Talu", "Lana", "Tavt", "Ahom", "Tibt", "Java", "Bali"),
}
_NO_LANGUAGE = {None, "mul", "mis", "zxx"}  # undetermined, several, without a code, no words at all


@dataclass(frozen=True)
class Language:
    """Language that a sample names."""

    code: str  # ISO 639 of the language alone, of a macrolanguage rather than its standard variety; or UNKNOWN
    spaced: bool | None  # whether words are written with spaces between; None where the language is unknown
    understood: bool = True  # False where something is named that is no BCP 47 tag (`Chinese`, `zh_CN.UTF-8`)


def language_of(meta: Mapping[str, Any]) -> Language:
    """Language of ``meta["language"]``; UNKNOWN where there is none, or one that is not understood."""
    named = meta.get("language")
    if named is None or (isinstance(named, str) and named.strip().casefold() in ("", UNKNOWN)):
        return Language(UNKNOWN, None)
    if not isinstance(named, str) or len(named) > LONGEST_TAG:
        return Language(UNKNOWN, None, understood=False)
    return _read(named.strip())


@functools.lru_cache(4096)
def _read(tag: str) -> Language:
    try:
        found = langcodes.Language.get(tag)
    except ValueError:
        return Language(UNKNOWN, None, understood=False)
    if not found.is_valid():
        return Language(UNKNOWN, None, understood=False)
    if found.language in _NO_LANGUAGE or found.language.startswith("x-"):
        return Language(UNKNOWN, None)
    return Language(found.prefer_macrolanguage().language, found.maximize().script not in UNSPACED)
