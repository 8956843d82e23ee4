"""Pages of ``omni-train train --help``: the recipes there are, and every key with its default, bound and meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_origin

from omegaconf import MISSING

from omni_train.errors import UserError
from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.keys import Entry, described

WIDTH = 80
_HEADER = """\
omni-train train [group=option …] [key=value …] [--cfg job]

Trains what the recipe says; the same command again goes on with the run. The
other commands are pipeline, launch, data and convert: omni-train --help.

  omni-train train data.path=DIR schedule.steps=100 seed=7
  omni-train launch 4 train parallel.tensor=2 parallel.pipeline=2 run=layout
  omni-train train --multirun seed=1,2,3        (one run after the other)
  omni-train train stage=s2_general --cfg job   (checks the recipe and shows it)
"""
_FOOTER = """\
omni-train train --hydra-help lists the flags. docs/recipes.md says how recipes
compose, and every combination that is refused.
"""
_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text"}


def overview(options: Mapping[str, Sequence[str]]) -> str:
    """First page of the help.

    Args:
        options: recipes of each group, which ``group=option`` chooses among.
    """
    entries = described(recipe_type()).values()
    groups = [entry for entry in entries if entry.group and "." not in entry.name]
    first = [entry for entry in entries if not entry.group and (entry.key.first or "." not in entry.name)]
    return "\n".join(
        [
            _HEADER,
            "Recipes (group=option):",
            _columns((group, ", ".join(names)) for group, names in options.items()),
            "Keys at the top, and those of the groups that are typed most (key=value):",
            *map(_paragraph, first),
            "",
            "Groups of keys (omni-train train --help GROUP lists them):",
            _columns((entry.name, entry.help) for entry in groups),
            _FOOTER,
        ]
    ).rstrip()


def page(name: str) -> str:
    """Page of a group's keys, or of one key.

    Raises:
        UserError: there is no group or key of this name.
    """
    entries = described(recipe_type())
    if name not in entries:
        groups = [entry.name for entry in entries.values() if entry.group and "." not in entry.name]
        raise UserError(f"--help {name}: no such key or group of keys; groups are {', '.join(groups)}")
    if entries[name].group is None:
        return _paragraph(entries[name]).rstrip()
    inside = [entry for entry in entries.values() if entry.name.rpartition(".")[0] == name]
    lines = [_filled(f"{name}: {entries[name].help}"), "", *(_paragraph(one) for one in inside if not one.group), ""]
    if inner := [(entry.name, entry.help) for entry in inside if entry.group]:
        lines += ["Groups in it (omni-train train --help GROUP lists their keys):", _columns(inner)]
    return "\n".join(lines).rstrip()


def _paragraph(entry: Entry) -> str:
    given = "" if entry.default == MISSING else written(entry.default)
    head = _filled(f"  {entry.name}={given}  ({facts(entry)})", "    ")
    return f"{head}\n{_filled(f'      {entry.help}', '      ')}"


def _columns(rows: Iterable[tuple[str, str]]) -> str:
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 4
    return "\n".join(_filled(f"  {name:{width - 2}}{text}", " " * width) for name, text in rows) + "\n"


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def facts(entry: Entry) -> str:
    """Type and bounds of a key's value, in words."""
    must = "must be given" if entry.default == MISSING else ""
    bounds = entry.key.bounds()
    if get_origin(entry.type) is list and bounds not in ("", "not empty"):
        bounds = f"each {bounds}"
    return ", ".join(filter(None, (_type(entry.type), bounds, must)))


def _type(hint: Any) -> str:
    inner = [one for one in get_args(hint) if one is not NoneType]
    if len(inner) < len(get_args(hint)):
        return f"{_type(inner[0])} or null"
    if get_origin(hint) is list:
        return f"list of {_type(inner[0])}s"
    if get_origin(hint) is dict:
        return f"{_type(inner[0])}s to {_type(inner[1])}s"
    if issubclass(hint, Enum):
        return " or ".join(one.name for one in hint)
    return _WORDS.get(hint, "group")


def written(value: Any) -> str:
    """Value as it is typed on the command line."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
