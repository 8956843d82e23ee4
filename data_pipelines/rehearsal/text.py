"""The rehearsal's text: the sources and documentation strings of the Python standard library of this machine.

Modules are parsed, never imported, so nothing runs and nothing depends on the platform's optional parts.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "urllib",
    "xml",
)
MAX_CHARACTERS = 20_000  # of one document: several rows of the smallest recipe, and no table of a hundred pages
MIN_CHARACTERS = 200

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def read() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All documents and all chats, each list in one shuffled order that is the same for the same Python."""
    documents, chats = [], []
    for name, source in modules():
        tree = ast.parse(source)
        documents += [_document(name, text) for text in _texts(source, tree)]
        chats += [chat for path, node in _definitions(name, tree) if (chat := _chat(path, node)) is not None]
    for samples in (documents, chats):
        random.Random(20250923).shuffle(samples)
    return documents, chats


def modules() -> Iterator[tuple[str, str]]:
    """Dotted name and source of the modules taken, in order of their names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [*library.glob("*.py"), *(file for package in PACKAGES for file in (library / package).rglob("*.py"))]
    for file in sorted(files):
        name = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        yield name, file.read_text(encoding="utf-8")


def _texts(source: str, tree: ast.Module) -> Iterator[str]:
    """The module's documentation, then the source of each of its top-level functions and classes."""
    yield ast.get_docstring(tree) or ""
    for node in tree.body:
        if isinstance(node, Definition):
            yield ast.get_source_segment(source, node) or ""


def _document(module: str, text: str) -> dict[str, Any]:
    return {"text": text[:MAX_CHARACTERS], "meta": _meta("code", module)}


def _meta(task: str, source: str) -> dict[str, Any]:
    return {"language": "en", "task": task, "source": source}


def _definitions(prefix: str, tree: ast.AST) -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            path = f"{prefix}.{node.name}"
            yield path, node
            yield from _definitions(path, node)


def _chat(path: str, node: Definition) -> dict[str, Any] | None:
    """A question about a definition, answered by the first paragraph of its documentation; for a function, its call."""
    documentation = inspect.cleandoc(ast.get_docstring(node) or "")
    summary = " ".join(documentation.split("\n\n")[0].split())
    if len(summary) < 20:
        return None
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    question = f"What does `{path}` do?" if kind == "function" else f"What is the class `{path}` for?"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": summary}]
    if kind == "function":
        call = f"`{node.name}({ast.unparse(node.args)})`"
        messages += [{"role": "user", "content": "How is it called?"}, {"role": "assistant", "content": call}]
    if len(summary) % 3 == 0:
        system = "You answer questions about Python's standard library."
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return {"messages": messages, "meta": _meta("question", path)}


def usable(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents long enough to learn from."""
    return [document for document in documents if len(document["text"]) >= MIN_CHARACTERS]
