"""How a key of the recipe is described: once, where it is declared, and read from there by all that ask.

Validation takes its bound, a run that goes on what a change of it means, ``--help`` and docs/recipes.md its line, and
pipelines whether it names a checkpoint::

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
    """What becomes of a run that goes on with another value of a key."""

    kept = "kept"  # it is refused: what a checkpoint holds (a tensor, a moment, a place in the data) depends on it
    learned = "learned"  # it goes on and learns otherwise; one that is complete is not what the recipe asks for
    free = "free"  # it learns the same


@dataclass(frozen=True, kw_only=True)
class Key:
    """What is said of a key beside its name, type and default. Bounds of a list are those of each of its elements."""

    help: str = ""
    """One line: what it is, in which unit."""
    ge: float | None = None
    """At least; as the others a bound of numbers, which `None` passes."""
    gt: float | None = None
    """Above."""
    le: float | None = None
    """At most."""
    lt: float | None = None
    """Below."""
    not_empty: bool = False
    """Of texts, lists and their elements."""
    remedy: str = ""
    """What to do instead, said when a bound is broken."""
    resume: Change | None = None
    """None: as the group that it is in; at the top `kept`."""
    checkpoint: bool = False
    """It names a checkpoint or a run, or holds their names."""
    linkable: bool = False
    """It says where files lie; where they have moved, a link will do."""
    first: bool = False
    """Typed often: ``--help`` shows it on its first page."""

    def bounds(self) -> str:
        """What must hold, in words; empty where everything may."""
        named = (("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        words = [f"{word} {number}" for word, number in named if number is not None]
        return ", ".join(words + ["not empty"] * self.not_empty)

    def problem(self, value: Any) -> str | None:
        """What a value breaks, in words."""
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
    """A key of a group, as a field of its dataclass.

    Args:
        default: its value where nothing is said; without one it must be given. Of a group, its dataclass.
        said: see :class:`Key`.
    """
    metadata = {"key": Key(**said)}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def key_of(one: Field) -> Key:
    """What is said of a dataclass's field."""
    return one.metadata.get("key", Key())


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key or a group of keys, as the schema has it."""

    name: str
    """Dotted, from the root; entries of a list by the list's name."""
    type: Any
    default: Any
    """Of a group that is always there, None."""
    key: Key
    change: Change
    group: type | None
    """The dataclass of a group, or of the entries of a list."""

    @property
    def help(self) -> str:
        """One line; of a group the first sentence of its docstring, and whether it may be left out or is a list."""
        if self.group is None:
            return self.key.help
        many = "; a list of them" if get_origin(self.type) is list else ""
        return (self.key.help or first_sentence(self.group)) + (
            "; null: none" if NoneType in get_args(self.type) else many
        )


@cache
def described(schema: type) -> Mapping[str, Entry]:
    """Every key and group of a schema by its dotted name, a group before what is in it."""
    return {entry.name: entry for entry in _entries(schema, "", Change.kept)}


def _entries(schema: type, prefix: str, inherited: Change) -> Iterator[Entry]:
    types = get_type_hints(schema)
    for one in fields(schema):
        said = key_of(one)
        change = said.resume or inherited
        hint = types[one.name]
        group = next((inner for inner in (hint, *get_args(hint)) if is_dataclass(inner)), None)
        default = one.default
        if default is NONE_GIVEN:
            default = None if one.default_factory is group else one.default_factory()
        yield Entry(name=prefix + one.name, type=hint, default=default, key=said, change=change, group=group)
        if group is not None:
            yield from _entries(group, f"{prefix}{one.name}.", change)


def values(group: Any, prefix: str = "") -> Iterator[tuple[str, Key, Any]]:
    """Every key and group of a recipe's group with what is said of it and its value, elements of lists included."""
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
    """What the docstring of a class begins with."""
    paragraph = " ".join((documented.__doc__ or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".").replace("``", "`")
