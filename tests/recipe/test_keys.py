"""A key is described once, where it is declared, and everything that is asked of it comes from there."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from omni_train.recipe.keys import Change, Key, described, first_sentence, key, values
from omni_train.recipe.schema import Recipe


@dataclass
class Inner:
    """What is inside. And more of it."""

    weight: float = key(1.0, gt=0, lt=2, help="of it")


@dataclass
class Outer:
    name: str = key(not_empty=True, help="its name")
    sizes: list[int] = key([1, 2], ge=1, resume=Change.free)
    one: Inner = key(Inner, resume=Change.learned)
    none: Inner | None = key(None)
    many: list[Inner] = field(default_factory=list)


def test_every_key_of_the_schema_says_what_it_is_in_one_line():
    for name, entry in described(Recipe).items():
        assert entry.help and "\n" not in entry.help and not entry.help.endswith("."), name


def test_a_schema_is_described_with_what_is_inherited():
    keys = described(Outer)
    assert list(keys) == [
        *("name", "sizes", "one", "one.weight"),
        *("none", "none.weight", "many", "many.weight"),
    ]
    assert [keys[name].change for name in ("name", "sizes", "one.weight", "none.weight")] == [
        *(Change.kept, Change.free, Change.learned, Change.kept)
    ]
    assert (keys["name"].default, keys["sizes"].default, keys["one"].default) == ("???", [1, 2], None)
    assert [keys[name].group for name in ("name", "one", "none", "many")] == [None, Inner, Inner, Inner]
    assert keys["one"].help == first_sentence(Inner) == "What is inside"
    assert keys["many"].help == "What is inside; a list of them"
    assert keys["none"].help == "What is inside; null: none"


def test_lists_are_not_shared_between_recipes():
    first, second = Outer(name="a"), Outer(name="b")
    first.sizes.append(3)
    first.one.weight = 0.5
    assert (second.sizes, second.one.weight) == ([1, 2], 1.0)


def test_values_are_walked_into_lists():
    outer = Outer(name="a", many=[Inner(), Inner(weight=3.0)])
    found = {name: value for name, _, value in values(outer)}
    assert found["sizes[1]"] == 2
    assert found["many[1].weight"] == 3.0
    assert found["none"] is None


@pytest.mark.parametrize(
    ("said", "value", "problem"),
    [
        (Key(ge=1), 0, "must be at least 1"),
        (Key(gt=0), 0.0, "must be above 0"),
        (Key(le=1), 1.5, "must be at most 1"),
        (Key(lt=1), 1.0, "must be below 1"),
        (Key(), float("nan"), "must be a finite number"),
        (Key(le=1), float("-inf"), "must be a finite number"),
        (Key(not_empty=True), "", "must not be empty"),
        (Key(not_empty=True), [], "must not be empty"),
        (Key(gt=0, remedy="leave it out"), 0, "must be above 0; leave it out"),
        *((Key(ge=1, le=3), value, None) for value in (1, 3, 2.5, None, [])),
        (Key(gt=0, lt=1), 0.5, None),
        (Key(not_empty=True), None, None),
        (Key(not_empty=True), "x", None),
    ],
)
def test_a_value_is_held_against_what_is_said(said, value, problem):
    assert said.problem(value) == problem


def test_bounds_in_words():
    assert Key(ge=0, lt=1).bounds() == "at least 0, below 1"
    assert Key(not_empty=True).bounds() == "not empty"
    assert Key().bounds() == ""
