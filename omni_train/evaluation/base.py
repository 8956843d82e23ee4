"""What an evaluation of a network gives: metrics, and exhibits to look at and listen to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Medium:
    """A sound, image or video among the cells of an exhibit: a file of the run, or the bytes of one."""

    kind: str
    """audio, image or video."""
    name: str
    """Path of the file, relative to where such files are kept."""
    content: Path | bytes


Cell = str | float | None | Medium


class Exhibit(Protocol):
    """A held-out question with its answer, an utterance with its resynthesis, or the like, to be shown."""

    table: str
    """Name of the table that such exhibits go to."""

    def line(self) -> str:
        """What a terminal shows of it."""
        ...

    def cells(self) -> dict[str, Cell]:
        """Its row of the table, by column; every exhibit of a table has the same columns."""
        ...


@dataclass
class Evaluated:
    """What came of asking a network held-out questions."""

    metrics: dict[str, float] = field(default_factory=dict)
    """``eval_…`` over all ranks, equal on each."""
    exhibits: Sequence[Exhibit] = ()
    """This rank's that are to be shown."""


Evaluation = Callable[[Any], Evaluated]
"""Asks a network, whole and unwrapped, the same held-out questions at every call. Collective."""
