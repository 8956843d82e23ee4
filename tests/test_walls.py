"""The wall that import-linter and ruff cannot hold: data code knows no process groups, and of Megatron only energon."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("megatron.core", "megatron.training", "torch.distributed")


def names_used(source: str) -> set[str]:
    """Every module imported and every dotted name written in a source file, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


def crossings(source: str) -> set[str]:
    return {name for name in names_used(source) if any(f"{name}.".startswith(f"{part}.") for part in FORBIDDEN)}


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from megatron.core.utils import divide",
        "def f():\n    import torch\n    torch.distributed.barrier()",
    ],
)
def test_the_check_finds_a_crossing_however_it_is_written(source):
    assert crossings(source)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "omni_train" / "data").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_data_code_knows_no_process_groups_and_of_megatron_only_energon(path):
    assert crossings(path.read_text()) == set()
