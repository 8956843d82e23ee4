"""Descriptions of the recipe's keys: each is given once, where the key is declared, and read from there.

Validation takes its bound, a run that goes on what a change of it means, ``--help`` and docs/recipes.md its line, and
pipelines whether it names a checkpoint or data::

    steps: int = key(ge=0, first=True, help="optimizer steps of the run; 0 writes the initial checkpoint and ends")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NONE_GIVEN
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING


class Change(StrEnum):
    """Effect of resuming a run with another value of a key."""

    kept = "kept"  # it is refused: what a checkpoint holds (a tensor, a moment, a place in the data) depends on it
    learned = "learned"  # it goes on and learns otherwise; one that is complete is not what the recipe asks for
    free = "free"  # it learns the same


@dataclass(frozen=True, kw_only=True)
class Key:
    """Description of a key beside its name, type and default. Bounds of a list hold for each of its elements."""

    help: str = ""
    """Meaning of the key in one line, with its unit."""
    ge: float | None = None
    """Least value; as the other bounds it is for numbers, and `None` passes."""
    gt: float | None = None
    """Bound that the value must be above."""
    le: float | None = None
    """Greatest value."""
    lt: float | None = None
    """Bound that the value must be below."""
    not_empty: bool = False
    """Whether texts, lists and their elements must not be empty."""
    remedy: str = ""
    """Advice that is added to the message when a bound is broken."""
    resume: Change | None = None
    """Effect of a change on resume; None for that of the key's group, which at the top is `kept`."""
    checkpoint: bool = False
    """Whether the value is the path of a checkpoint or a run, or holds such paths."""
    data: bool = False
    """Whether the value is the path of a folder of data, or of what is in one, or holds such paths."""
    linkable: bool = False
    """Whether the value is a path of files that may be replaced by a link where they have moved."""
    first: bool = False
    """Whether ``--help`` shows the key on its first page, as it is typed often."""

    def bounds(self) -> str:
        """Bounds of the key in words; empty where it has none."""
        named = (("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        words = [f"{word} {number}" for word, number in named if number is not None]
        return ", ".join(words + ["not empty"] * self.not_empty)

    def problem(self, value: Any) -> str | None:
        """Bound that a value breaks, in words; None where it breaks none."""
        if isinstance(value, float) and not math.isfinite(value):  # NaN passes every comparison with a bound
            return "must be a finite number"
        found = self._broken(value)
        return found and found + (f"; {self.remedy}" if self.remedy else "")

    def _broken(self, value: Any) -> str | None:
        if self.not_empty and isinstance(value, str | list | dict) and not value:
            return "must not be empty"
        if not isinstance(value, int | float):
            return None
        if self.ge is not None and value < self.ge:
            return f"must be at least {self.ge}"
        if self.gt is not None and value <= self.gt:
            return f"must be above {self.gt}"
        if self.le is not None and value > self.le:
            return f"must be at most {self.le}"
        if self.lt is not None and value >= self.lt:
            return f"must be below {self.lt}"
        return None


def key(default: Any = MISSING, **said: Any) -> Any:
    """Field of a group's dataclass that declares a key.

    Args:
        default: default value, without which the key must be given; of a group, its dataclass.
        said: attributes of :class:`Key`.
    """
    metadata = {"key": Key(**said)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def key_of(one: Field) -> Key:
    """Description of the key that a field of a dataclass declares."""
    return one.metadata.get("key", Key())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key or a group of keys in the schema."""

    name: str
    """Dotted name from the root; entries of a list have the list's name."""
    type: Any
    default: Any
    """Default value; None for a group that is always there."""
    key: Key
    change: Change
    group: type | None
    """Dataclass of a group, or of the entries of a list."""

    @property
    def help(self) -> str:
        """Meaning in one line; of a group the first sentence of its docstring, and whether it is optional or a list."""
        if self.group is None:
            return self.key.help
        many = "; a list of them" if get_origin(self.type) is list else ""
        return (self.key.help or first_sentence(self.group)) + (
            "; null: none" if NoneType in get_args(self.type) else many
        )


def described(schema: type) -> Mapping[str, Entry]:
    """Every key and group of a schema by its dotted name, a group before what is in it."""
    return _described(schema)


@cache  # by itself: type checkers take a dataclass, as an argument of what is cached, for its unhashable instances
def _described(schema: type) -> Mapping[str, Entry]:
    return {entry.name: entry for entry in _entries(schema, "", Change.kept)}


def _entries(schema: type, prefix: str, inherited: Change) -> Iterator[Entry]:
    types = get_type_hints(schema)
    for one in fields(schema):
        said = key_of(one)
        change = said.resume or inherited
        hint = types[one.name]
        group = next(
            (inner for inner in (hint, *get_args(hint)) if isinstance(inner, type) and is_dataclass(inner)), None
        )
        default = one.default
        if default is NONE_GIVEN:
            make: Any = one.default_factory
            default = None if make is group else make()
        yield Entry(name=prefix + one.name, type=hint, default=default, key=said, change=change, group=group)
        if group is not None:
            yield from _entries(group, f"{prefix}{one.name}.", change)


def values(group: Any, prefix: str = "") -> Iterator[tuple[str, Key, Any]]:
    """(name, description, value) of every key and group within a group of a recipe, elements of lists included."""
    for one in fields(group):
        name, said, value = prefix + one.name, key_of(one), getattr(group, one.name)
        yield name, said, value
        if is_dataclass(value):
            yield from values(value, f"{name}.")
        for i, element in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(element):
                yield from values(element, f"{name}[{i}].")
            else:
                yield f"{name}[{i}]", said, element


def first_sentence(documented: type) -> str:
    """First sentence of the docstring of a class."""
    paragraph = " ".join((documented.__doc__ or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".").replace("``", "`")
