"""The walls that import-linter and ruff cannot hold: data code knows no process groups, and of Megatron only energon;
files are unpickled in few places."""

from __future__ import annotations

import ast
import re
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


def test_files_are_unpickled_in_few_places():
    """Where only data can come of it; what strangers have written must come through one of them."""
    unpickles = re.compile(r"torch\.load\(|pickle\.loads?\(|pickle\.Unpickler\b|allow_pickle=True|weights_only=False")
    rooms = [path for room in ("omni_train", "data_pipelines") for path in sorted((ROOT / room).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix() for path in rooms if unpickles.search(path.read_text())}
    assert found == {
        "omni_train/data/transfer.py",  # these three only between processes of one command
        "omni_train/data/workers.py",
        "data_pipelines/states/contexts.py",
        "omni_train/checkpoint/sharded_files.py",
        "omni_train/checkpoint/state_files.py",
    }
