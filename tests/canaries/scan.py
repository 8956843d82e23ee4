"""Which private names of other packages a source file of ours uses, and which of their names it replaces.

Private is a name that begins with an underscore, ``__special__`` ones too but for Python's own. Such a name is another
package's where our file does not bind it itself: nothing in the file is called so, and no method sets it on ``self``. A
method or class attribute of that kind counts too where the class derives from another package's, which has one of that
name already.
"""

from __future__ import annotations

import ast
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

OURS = ("omni_train", "data_pipelines")
PYTHONS = {"_exit", "_getframe", "_replace", "__dataclass_fields__", "__future__"}
"""Names of Python itself, documented for all their underscores."""
PYTHONS |= {name for thing in (type, sys, BaseException(), io.StringIO()) for name in dir(thing) if name[:2] == "__"}


def is_private(word: str) -> bool:
    return word.startswith("_") and word not in PYTHONS


@dataclass
class File:
    """What one source file binds and imports."""

    tree: ast.Module
    own: set[str] = field(default_factory=set)  # names that it binds
    imported: dict[str, list[str]] = field(default_factory=dict)  # other packages' -> where they come from
    shared: set[str] = field(default_factory=set)  # classes and modules of ours, whose private names are ours

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    self.own.add(node.attr)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    bound = alias.asname or alias.name.split(".")[0]
                    self._bind(bound, alias.name if alias.asname else bound)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self._bind(alias.asname or alias.name, f"{node.module}.{alias.name}")
        for node in ast.walk(self.tree):  # `for module in (one, other): module.name = …`, and `short = one.name`
            if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Tuple):
                self.imported[node.target.id] = [name for item in node.iter.elts for name in self.names(item)]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and self.names(node.value):
                self.imported.setdefault(node.targets[0].id, self.names(node.value))

    def _bind(self, bound: str, name: str) -> None:
        if name.split(".")[0] in OURS:
            self.shared.add(bound)
        else:
            self.imported.setdefault(bound, []).append(name)

    def is_ours(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.shared

    def derives_from_ours(self, node: ast.AST) -> bool:
        return isinstance(node, ast.ClassDef) and any(map(self.is_ours, node.bases))

    def names(self, node: ast.AST) -> list[str]:
        """The dotted names that an expression may stand for, as far as imports tell."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, [])
        if isinstance(node, ast.Attribute):
            return [f"{name}.{node.attr}" for name in self.names(node.value)]
        return []


def private_names(source: str, has: Callable[[str, str], bool] = lambda base, name: False) -> set[str]:
    """The private names of other packages that a source file uses; of a dotted one that it imports the last word.

    Args:
        source: of the file.
        has: whether a class, by its dotted name, has an attribute.
    """
    file = File(ast.parse(source))
    found: set[str] = set()
    inherited = {node for owner in ast.walk(file.tree) if file.derives_from_ours(owner) for node in _of_self(owner)}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(_last_private(name) for name in _imported(node))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in file.own:
            if node not in inherited and not file.is_ours(node.value):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            if isinstance(name := getattr(node.args[1], "value", None), str) and is_private(name):
                found.update({name} - file.own)
        elif isinstance(node, ast.ClassDef):
            bases = [name for base in node.bases for name in file.names(base)]
            own = {name for name in _class_names(node) if is_private(name)}
            found.update(name for name in own if any(has(base, name) for base in bases))
    return found - {""}


def replaced_names(source: str) -> set[str]:
    """The dotted names of other packages that a source file puts something else in the place of."""
    file = File(ast.parse(source))
    return {
        name
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        for name in file.names(node)
    }


def _of_self(owner: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "super()"):
            yield node


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
    for alias in node.names:
        if (name := f"{prefix}{alias.name}").split(".")[0] not in OURS:
            yield name


def _last_private(name: str) -> str:
    """The last word of a dotted name in which one is private, as in ``hydra._internal.utils.word``; else nothing."""
    words = name.split(".")
    return words[-1] if any(map(is_private, words)) else ""


def _class_names(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef):
            yield statement.name
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))
    yield from (inner.attr for inner in _of_self(node) if isinstance(inner.ctx, ast.Store))
