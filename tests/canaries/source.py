"""What the source of an installed package defines, read without importing it.

Once the platform is set up, some of these names hold what omni_train has put there, and would be found in any version.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """A definition: the parameters of a function or the fields of a dataclass as they are written, else None."""

    parameters: str | None = None


def installed(package: str) -> bool:
    return find_spec(package) is not None


def module_file(name: str) -> tuple[Path | None, list[str]]:
    """The file of the module that a dotted name begins with, None where there is none, and the words behind it."""
    package, *words = name.split(".")
    spec = find_spec(package)
    if spec is None:
        return None, words
    if not spec.submodule_search_locations:
        return Path(spec.origin), words
    for index in range(len(words), -1, -1):
        for place in spec.submodule_search_locations:
            base = Path(place).joinpath(*words[:index])
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file.is_file():
                    return file, words[index:]
    return None, words


def find(name: str) -> Found | None:
    """What a dotted name is, None where the package has nothing of that name."""
    file, words = module_file(name)
    if file is None:
        return None
    scope: dict = _defined(file)
    found: ast.AST | None = None
    for index, word in enumerate(words):
        if word not in scope:
            made = "__getattr__" in scope and f"'{word}'" in ast.unparse(scope["__getattr__"])
            return Found() if made else None
        found = scope[word]
        scope = _members(found) if index < len(words) - 1 else {}
    if isinstance(found, ast.FunctionDef):
        return Found(_written(found.args))
    if isinstance(found, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in found.decorator_list):
        return Found(", ".join(ast.unparse(part.target) for part in found.body if isinstance(part, ast.AnnAssign)))
    return Found()


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def _defined(file: Path) -> dict[str, ast.AST]:
    return _members(tree(file))


def _members(scope: ast.AST) -> dict[str, ast.AST]:
    """Names that a module or class defines or imports; of a class also what its methods set on ``self``."""
    members = {name: node for statement in _statements(scope) for name, node in _bound(statement)}
    if isinstance(scope, ast.ClassDef):
        for node in ast.walk(scope):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                members.setdefault(node.attr, node)
    return members


def _statements(scope: ast.AST) -> Iterator[ast.AST]:
    """Those of a scope, in whatever ``if`` or ``try`` they stand."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _statements(child)
        else:
            yield child


def _bound(statement: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name, statement
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name, statement) for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        names = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        yield from ((name.id, statement) for name in names)


def _written(arguments: ast.arguments) -> str:
    words = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    words += [f"*{arguments.vararg.arg}"] if arguments.vararg else ["*"] if arguments.kwonlyargs else []
    words += [argument.arg for argument in arguments.kwonlyargs]
    words += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(words)
