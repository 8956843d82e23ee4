"""Times written in text, in seconds: 12.5, 1,234 seconds, 2 minutes 3 seconds, 1:15, 00:01:15.5."""

from __future__ import annotations

import math
import re
import unicodedata

_THIN = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # spaces that group digits
_VULGAR = re.compile(r"(?=[¼-¾⅐-⅞])")
_FRACTION = re.compile(r"(?:(?<![\d.,])(\d+)\s+)?(?<![\d.,])(\d+)[/⁄]([1-9]\d*)")
_GROUPED = r"[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d+)?"
_NUMBER = re.compile(
    rf"(?:(?<![\w.,])-)?(?:{_GROUPED}|\d{{1,3}}(?:\.\d{{3}})+,\d+|\d{{1,3}}(?:\.\d{{3}}){{2,}}|\d+(?:[.,]\d+)?|\.\d+)"
)
_CLOCK = re.compile(r"(?:(?<![\w.,])-)?(?:(\d+):)?(\d+):([0-5]?\d(?:[.,]\d+)?)(?![\d:])")
_UNITS = (  # of English, German, French, Spanish, Italian, Chinese and Japanese
    (r"h|hrs?|hours?|std|stunden?|heures?|horas?|or[ae]|个?小时|時間", 3600),
    (r"m|min|mins|minut\w*|分钟?", 60),
    (r"ms|msec|milli\w*|毫秒", 0.001),
    (r"s|secs?|seconds?|sek|sekunden?|secondes?|segundos?|second[oi]|秒钟?", 1),
)
_LENGTHS = tuple((re.compile(rf"(?:{names})(?![^\W\d_一-鿿])"), seconds) for names, seconds in _UNITS)
_JOINT = re.compile(r"\.?[\s,]*(?:(?:and|und|et|y|e)\s+)?")


def seconds(text: str) -> float | None:
    """First time in a text, in seconds; where no number has a unit of time, the first number; or None.

    A comma before exactly three digits groups them (1,234 is a thousand and more) unless a zero alone is before it; any
    other is a decimal comma (10,5). A point is a decimal point, but groups where a decimal comma or another follows.
    """
    text = _VULGAR.sub(" ", _THIN.sub("", text).replace("−", "-"))
    text = _FRACTION.sub(_decimal, unicodedata.normalize("NFKC", text).casefold())
    for number in _NUMBER.finditer(text):
        if clock := _CLOCK.match(text, number.start()):
            hours, minutes, rest = clock.groups()
            total = _value(hours or "0") * 3600 + _value(minutes) * 60 + _value(rest)
            return _finite(-total if clock[0].startswith("-") else total)
        if (total := _with_units(text, number)) is not None:
            return _finite(total)
    first = _NUMBER.search(text)
    return _finite(_value(first[0])) if first else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # of hundreds of digits, which a model may write


def _with_units(text: str, number: re.Match[str] | None) -> float | None:
    """Seconds of a number and of those behind it, each with a smaller unit of time; None where the first has none."""
    total, last, end = None, float("inf"), None
    while number is not None:
        glued = end == number.start()
        length, end = _unit(text, number.end())
        if length is None and glued:
            length, end = last / 60, number.end()  # 1h30
        if length is None or length >= last:
            break
        total, last = (total or 0.0) + _value(number[0]) * length, length
        number = _NUMBER.match(text, _JOINT.match(text, end).end())
    return total


def _unit(text: str, index: int) -> tuple[float, int] | tuple[None, int]:
    """Seconds of the unit of time at an index of the text, behind spaces or not, and the index of its end."""
    while text[index : index + 1].isspace():
        index += 1
    found = ((length, match.end()) for names, length in _LENGTHS if (match := names.match(text, index)))
    return next(found, (None, index))


def _decimal(fraction: re.Match[str]) -> str:
    whole, above, below = fraction.groups()
    return f"{float(whole or 0) + float(above) / float(below):.6f}"


def _value(digits: str) -> float:
    if re.fullmatch(f"-?{_GROUPED}", digits):
        return float(digits.replace(",", ""))
    if "," in digits or digits.count(".") > 1:
        return float(digits.replace(".", "").replace(",", "."))
    return float(digits)
