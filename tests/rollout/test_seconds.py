"""Seconds are read as a person writes them."""

from __future__ import annotations

import pytest

from omni_train.rollout.seconds import seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("about 12.5s", 12.5),
        ("0,5", 0.5),
        ("at 10,5", 10.5),
        ("３ seconds", 3.0),
        (".5", 0.5),
        ("1,234 seconds", 1234.0),
        ("1,234.5", 1234.5),
        ("1.234,5 Sekunden", 1234.5),
        ("1.234", 1.234),
        ("1.234.567", 1234567.0),
        ("1\u202f234 s", 1234.0),
        ("0,500", 0.5),
        ("0,500,000", 0.5),
        ("1:15", 75.0),
        ("at 00:01:15.5.", 75.5),
        ("2:05:10", 7510.0),
        ("1:75", 1.0),
        ("2 minutes 3 seconds", 123.0),
        ("2 min. and 3 sec.", 123.0),
        ("1h 2m 3s", 3723.0),
        ("1 h", 3600.0),
        ("1h30", 5400.0),
        ("1 Stunde und 2 Minuten", 3720.0),
        ("2 minuti e 3 secondi", 123.0),
        ("1小时2分3秒", 3723.0),
        ("500 ms", 0.5),
        ("10 meters", 10.0),
        ("5½ seconds", 5.5),
        ("1/2 second", 0.5),
        ("Event 2 happens at 7 seconds", 7.0),
        ("3-5", 3.0),
        ("-5", -5.0),
        ("−1:15", -75.0),
        ("none", None),
        ("9" * 500, None),
    ],
)
def test_the_time_that_a_text_names(text, expected):
    assert seconds(text) == (None if expected is None else pytest.approx(expected))
