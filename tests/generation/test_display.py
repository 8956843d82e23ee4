"""Text and bar do not write over each other, whichever of the two streams is a terminal."""

from __future__ import annotations

import contextlib
import io

import pytest

from omni_train.generation.display import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "err"), [(io.StringIO, io.StringIO), (io.StringIO, Terminal), (Terminal, Terminal)])
@pytest.mark.parametrize("speaks", [False, True])
def test_the_text_is_on_standard_output_once_and_the_bar_on_standard_error(monkeypatch, out, err, speaks):
    monkeypatch.setenv("TERM", "xterm")
    stdout, stderr, whole = out(), err(), []
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), Display(speaks) as display:
        display.add("kalan ")
        display.spoken(1.25)
        display.add("moper")
        whole.append(stdout.getvalue())
    assert stdout.getvalue() == "kalan moper\n"
    live, above = speaks and err is Terminal, speaks and err is out is Terminal
    assert whole == ["" if above else "kalan moper"]
    assert ("1.2 s" in stderr.getvalue()) == live
    assert ("moper" in stderr.getvalue()) == above
