"""What omni_train relies on of other packages, and how a canary says that it is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest

DISTRIBUTIONS = {
    "deepspeed": "deepspeed",
    "fla": "flash-linear-attention",
    "hydra": "hydra-core",
    "megatron.core": "megatron-core",
    "megatron.energon": "megatron-energon",
    "PIL": "pillow",
    "torch": "torch",
}


@dataclass(frozen=True)
class Use:
    """A name of another package that is not public, or that a file of ours replaces."""

    user: str  # the file
    name: str
    parameters: str | None  # as the package writes them; None of what takes none, or of what we do not say


def read_table() -> list[Use]:
    """The lines of uses.txt."""
    uses, user = [], ""
    for line in (Path(__file__).parent / "uses.txt").read_text().splitlines():
        if line.startswith("    "):
            name, parameters = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", line.strip()).groups()
            uses.append(Use(user, name, parameters))
        elif line and not line.startswith("#"):
            user = line
    return uses


def distribution(name: str) -> str:
    """What a dotted name is installed with."""
    return next(value for key, value in DISTRIBUTIONS.items() if f"{name}.".startswith(f"{key}."))


def versioned(name: str) -> str:
    """What a dotted name is installed with, and its version."""
    return f"{distribution(name)} {installed_version(distribution(name))}"


@contextmanager
def relied_on(package: str, what: str, *users: str) -> Iterator[None]:
    """Around a test of what a package does; should it fail, it says what is no longer so and which files suffer."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        pytest.fail(
            f"{versioned(package)}: it is no longer so that {what}; {', '.join(users)} relies on it. "
            f"{type(error).__name__}: {error}"
        )
