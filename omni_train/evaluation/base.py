"""Results of evaluating a network in the loop: metrics, and exhibits to look at and listen to."""

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
        """The exhibit as a terminal shows it, in one line."""
        ...

    def cells(self) -> dict[str, Cell]:
        """The exhibit's row of the table, by column; every exhibit of a table has the same columns."""
        ...


@dataclass
class Evaluated:
    """Result of one evaluation on held-out data."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics ``eval_…`` over all ranks, equal on each."""
    exhibits: Sequence[Exhibit] = ()
    """Exhibits of this rank that are to be shown."""


Evaluation = Callable[[Any], Evaluated]
"""Function that evaluates a network, whole and unwrapped, on the same held-out data at every call. Collective."""
