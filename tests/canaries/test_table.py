"""Every name in uses.txt is still there and takes what it took, and uses.txt has every one that omni_train uses."""

from __future__ import annotations

import functools
import pkgutil
import re
import tomllib
from pathlib import Path

import pytest
import torch

from omni_train import platform
from tests.canaries.scan import OURS, private_names, replaced_names
from tests.canaries.source import find, installed
from tests.canaries.table import Use, distribution, read_table, versioned

ROOT = Path(__file__).parents[2]
FILES = [path.relative_to(ROOT).as_posix() for room in OURS for path in sorted((ROOT / room).rglob("*.py"))]
USES = read_table()
STAND_INS = ("omni_train/platform/cpu.py", "omni_train/platform/cpu_streams.py")
"""They replace public names of torch by others that do the same on a CPU, as every test on a CPU shows."""
OWN = {"_pinned": "omni_train/platform/cpu_streams.py"}
"""Names of ours on objects of others."""


def parameters_of(name: str) -> str | None:
    """What a name's function takes, None of what is no function. Raises LookupError: there is nothing of that name."""
    if found := find(name):
        return found.parameters
    if not name.startswith("torch."):
        raise LookupError(name)
    try:  # torch makes some in C++
        value = pkgutil.resolve_name(name)
    except AttributeError:
        raise LookupError(name) from None
    if not isinstance(value, torch._ops.OpOverloadPacket):
        return None
    return ", ".join(argument.name for argument in value.default._schema.arguments)


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.user}:{use.name}")
def test_what_is_used_is_there_and_takes_what_it_took(use: Use):
    if use.name.startswith("fla.") and not installed("fla"):
        pytest.skip("flash-linear-attention is not installed")
    try:
        parameters = parameters_of(use.name)
    except LookupError:
        pytest.fail(f"{versioned(use.name)} has no {use.name}, on which {use.user} relies")
    if parameters != use.parameters:
        pytest.fail(
            f"{versioned(use.name)}: {use.name} takes ({parameters}), not ({use.parameters}); see that {use.user} is "
            "right about it, then write it into tests/canaries/uses.txt"
        )


@functools.cache
def has(base: str, name: str) -> bool:
    """Whether a class of another package has an attribute; its module may need the platform."""
    platform.setup()
    return hasattr(pkgutil.resolve_name(base), name)


@pytest.mark.parametrize("file", FILES)
def test_what_is_used_is_in_the_table(file: str):
    source = (ROOT / file).read_text()
    listed = {use.name for use in USES if use.user == file}
    words = {word for name in listed for word in name.split(".")}
    private = private_names(source, has) - {name for name, owner in OWN.items() if owner == file}
    replaced = {name for name in replaced_names(source) if name.split(".")[0] not in ("sys", "os")}
    if file in STAND_INS:
        replaced = {name for name in replaced if not name.startswith("torch.")}
    for name in sorted(private - words) + sorted(replaced - listed):
        pytest.fail(
            f"{file} uses {name}, which is private to another package or replaced there: use something public, or add "
            "it to tests/canaries/uses.txt, and a test of what is relied on"
        )


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.user}:{use.name}")
def test_what_is_in_the_table_is_used(use: Use):
    assert (ROOT / use.user).is_file(), f"uses.txt: there is no {use.user}"
    name = use.name.rpartition(".")[2]
    assert name in (ROOT / use.user).read_text(), f"uses.txt: {use.user} does not use {name}; take it out"


@pytest.mark.parametrize("package", sorted({distribution(use.name) for use in USES} - {"pillow"}))
def test_its_next_minor_version_is_not_installed_unseen(package: str):
    """Pillow's name is a setting that it means us to set, and nothing but speed hangs on it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    [ours] = [line for line in wanted if re.match(rf"{package}\b", line)]
    assert re.search(r",<\d+\.\d+$", ours), f"pyproject.toml: {ours} needs an upper bound, the next minor version"
