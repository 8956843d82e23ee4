"""``key=value`` arguments become the parameters of a function."""

import dataclasses
from pathlib import Path

import pytest

from omni_train.errors import UserError
from omni_train.options import call

CALLS = []


def build(out: Path, vocab_size: int = 4096, ratio: float | None = None, fast: bool = False, name: str = "x") -> None:
    """Write it."""
    CALLS.append((out, vocab_size, ratio, fast, name))


def run(*arguments):
    CALLS.clear()
    return call("prog", {"build": lambda: build}, arguments)


def test_values_take_the_types_of_the_parameters():
    assert run("build", "out=/a=b", "ratio=0.5", "fast=true") == 0
    [arguments] = CALLS
    assert arguments == (Path("/a=b"), 4096, 0.5, True, "x")


def test_help_shows_the_arguments_and_the_docstring(capsys):
    assert run("build", "--help") == 0
    assert capsys.readouterr().out == (
        "prog build out=… [vocab_size=4096] [ratio=None] [fast=False] [name=x]\n\nWrite it.\n"
    )
    assert run("--help") == 0
    assert "prog build out=…" in capsys.readouterr().out
    assert CALLS == []


@pytest.mark.parametrize("place", range(3))
def test_help_may_stand_anywhere(place, capsys):
    words = ["build", "out=a"]
    assert run(*words[:place], "--help", *words[place:]) == 0
    assert "Write it." in capsys.readouterr().out
    assert CALLS == []


@dataclasses.dataclass
class Size:
    rows: int = 1
    scale: float = 1.0


def resize(out: Path, size: Size | None = None) -> None:
    CALLS.append((out, size))


def test_fields_of_a_dataclass_are_keys_with_a_dot(capsys):
    CALLS.clear()
    assert call("prog", {"resize": lambda: resize}, ["resize", "out=a", "size.rows=3"]) == 0
    assert call("prog", {"resize": lambda: resize}, ["resize", "out=a"]) == 0
    with_size, without = CALLS
    assert with_size == (Path("a"), Size(rows=3)) and without == (Path("a"), None)
    call("prog", {"resize": lambda: resize}, ["--help"])
    assert capsys.readouterr().out == "prog resize out=… [size.{rows,scale}=…]\n"
    with pytest.raises(UserError, match=r"size\.row is not an argument; did you mean size\.rows=\?"):
        call("prog", {"resize": lambda: resize}, ["resize", "out=a", "size.row=3"])
    with pytest.raises(UserError, match=r"size\.rows=x: expected int"):
        call("prog", {"resize": lambda: resize}, ["resize", "out=a", "size.rows=x"])


def copy(out: Path, **words: str) -> None:
    CALLS.append((out, words))


def test_a_function_may_take_all_other_words(capsys):
    CALLS.clear()
    assert call("prog", {"copy": lambda: copy}, ["copy", "model=tiny", "out=a", "data.sources=[{path: b=c}]"]) == 0
    assert [(Path("a"), {"model": "tiny", "data.sources": "[{path: b=c}]"})] == CALLS
    call("prog", {"copy": lambda: copy}, ["--help"])
    assert capsys.readouterr().out == "prog copy out=… [key=value …]\n"
    for words, message in {("model=x",): "out= is missing", ("out=a", "b.c=1", "b.c=2"): "b.c is given twice"}.items():
        with pytest.raises(UserError, match=message):
            call("prog", {"copy": lambda: copy}, ["copy", *words])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "prog needs one of build"),
        (["make"], "prog make does not exist; choose one of build"),
        (["build"], "out= is missing; usage: prog build out=…"),
        (["build", "ou=a"], "ou is not an argument; did you mean out=?"),
        (["build", "zzz=a"], "zzz is not an argument; usage: prog build out=…"),
        (["build", "out"], "out has no value; write out=…"),
        (["build", "out="], "out has no value; write out=…"),
        (["build", "out=a", "out=b"], "out is given twice; keep one"),
        (["build", "out=a", "vocab_size=4k"], "vocab_size=4k: expected int"),
        (["build", "out=a", "ratio=half"], "ratio=half: expected float"),
        (["build", "out=a", "fast=yes"], "fast=yes: expected true or false"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert str(error.value).startswith(message)
    assert CALLS == []
