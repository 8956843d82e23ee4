"""A stage of a pipeline that makes data: a command of ``omni-train data`` in the place of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omni_train.errors import UserError
from omni_train.options import parse

Commands = Mapping[str, Callable[[], Callable[..., Any]]]
"""Name -> loader of a function, importable by name, that makes the data in the folder that its ``out`` names."""

NO_COMMANDS: Commands = {}

_COMMAND = "command="


@dataclass(frozen=True)
class DataStage:
    """Stage that runs ``omni-train data NAME``."""

    command: str
    """Name of the command, ``data`` before it."""
    function: Callable[..., Any]
    """What the command calls."""
    words: Mapping[str, str]
    """Its arguments as one would type them, ``out`` among them."""

    @property
    def out(self) -> str:
        """Folder of the data that it makes."""
        return self.words["out"]

    def arguments(self) -> dict[str, Any]:
        """Arguments of the function, of its types.

        Raises:
            UserError: as :func:`omni_train.options.parse`.
        """
        pairs = (f"{key}={value}" for key, value in self.words.items())
        return parse(f"omni-train {self.command}", self.function, pairs)

    def with_inputs(self, change: Callable[[str], str]) -> DataStage:
        """Stage with ``change`` of every argument in its place, but of ``out``."""
        inputs = {key: change(value) for key, value in self.words.items() if key != "out"}
        return replace(self, words=inputs | {"out": self.out})

    def __str__(self) -> str:
        return " ".join(["omni-train", self.command, *(f"{key}={value}" for key, value in self.words.items())])


def makes_data(words: Sequence[str]) -> bool:
    """Whether the words of a stage are those of one that makes data: the first is ``command=``."""
    return bool(words) and words[0].startswith(_COMMAND)


def data_stage(words: Sequence[str], out: str, commands: Commands) -> DataStage:
    """Stage that makes data, with all checked that can be before what it reads is there.

    Args:
        words: ``command=data NAME``, then the command's ``key=value``; of two with one key the last holds.
        out: folder that the data are made in.
        commands: commands by name.

    Raises:
        UserError: there is no such command, or an argument of it is unknown, missing or of another type.
    """
    command, *pairs = words
    room, _, name = command.removeprefix(_COMMAND).partition(" ")
    if room != "data" or name not in commands:
        choices = ", ".join(f"`data {known}`" for known in commands)
        raise UserError(f"{command}: no such command of a pipeline; choose one of {choices}")
    given = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    if "out" in given:
        raise UserError(f"out={given['out']}: a stage of a pipeline writes to {out}; leave out= away")
    stage = DataStage(f"data {name}", commands[name](), given | {"out": out})
    stage.arguments()
    return stage
