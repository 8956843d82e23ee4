"""Pages, docstrings and comments name files, modules and headings that exist; what docs/extending.md shows works."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_runs import write_world

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "data_pipelines", "docs", "launchers", "omni_train", "recipes", "tests")
NAMES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")} | {
    path.name for path in ROOT.iterdir()
}
SOURCES = [path for folder in ("omni_train", "data_pipelines", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
FILE = re.compile(r"(?<![\w./*-])[a-z_][\w.-]*(?:/[\w.-]+)*\.(?:py|sh|yaml|md|txt|toml)\b(?![\w/])")
MODULE = re.compile(r"\bomni_train(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")
BLOCK = re.compile(r"^```(?:python|yaml)\n(?:# (mine/\S+)\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = ("mine/", "runs/", "report/")
OF_A_RUN = {"recipe.yaml", "statistics.md", "strata.md", "report.md", "dataset.yaml"}
"""Files that are not the project's: those of runs and data folders."""


def prose(path: Path) -> str:
    """A page without the files that it shows, or the docstrings and comments of a module."""
    text = path.read_text()
    if path.suffix == ".md":
        return BLOCK.sub("", text)
    said = [one.string for one in tokenize.generate_tokens(io.StringIO(text).readline) if one.type == tokenize.COMMENT]
    expressions = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    said += [one.value for one in expressions if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return "\n".join(said)


def missing(text: str, folder: Path) -> Iterator[str]:
    """What a text in a folder names that is not there: files, by their path from the root, a room or the folder, or by
    their name alone, and modules of the package with what is in them."""
    for name in FILE.findall(text):
        if name.startswith(EXAMPLES) or Path(name).name in OF_A_RUN or re.search("[A-Z]{2}", Path(name).stem):
            continue
        bases = (ROOT, ROOT / "omni_train", folder)
        if not (any((base / name).exists() for base in bases) if "/" in name else name in NAMES):
            yield name
    for name in MODULE.findall(text):
        path, rest = ROOT, name.split(".")
        while rest and (path / rest[0]).is_dir():
            path /= rest.pop(0)
        if rest and (path / f"{rest[0]}.py").is_file():
            path /= f"{rest.pop(0)}.py"
        if rest and not re.search(rf"\b{rest[0]}\b", (path if path.is_file() else path / "__init__.py").read_text()):
            yield name


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_names_and_links_what_there_is(path):
    assert list(missing(prose(path), path.parent)) == []
    for name, anchor in LINK.findall(prose(path)):
        page = path.parent / name if name else path
        assert page.exists(), name
        assert not anchor or anchor in headings(page), f"{name}#{anchor}"


def test_docstrings_and_comments_name_what_there_is():
    found = {path.relative_to(ROOT).as_posix(): list(missing(prose(path), path.parent)) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_is_not_there_is_found():
    said = (
        "`training/report.py`, engine_of_old.py, omni_train.training.report and :class:`omni_train.cli.Command`; cli.py"
    )
    assert [*missing(said, ROOT)] == [
        "training/report.py",
        "engine_of_old.py",
        "omni_train.training.report",
        "omni_train.cli.Command",
    ]


def test_the_modules_of_extending_add_what_they_say(tmp_path):
    """All are imported and checked, and one of the networks learns from its kind of rows."""
    for name, text in BLOCK.findall((ROOT / "docs" / "extending.md").read_text()):
        if name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    write_world(tmp_path)
    modules = sorted(path.stem for path in (tmp_path / "mine").glob("*.py"))
    program = "from omni_train.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    common = ["train", "--config-dir", "mine/recipes", "data=shards", "data.path=.", "data.workers=0"]
    rows = ["network=letter_gru", "model=gru", "data.rows=letters", "data.alignment=1", "data.row_tokens=256"]
    rows += [
        "engine=deepspeed",
        "data.sources=[{path: text}]",
        "schedule.steps=2",
        "schedule.global_batch=2",
        "run=rows",
    ]
    for words in (["network=calm", "calm.weight=0.5", "--cfg", "job"], rows):
        done = subprocess.run(
            [sys.executable, "-c", program, *common, *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:mine", "OMNI_TRAIN_PLUGINS": ",".join(modules)},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "rows" / "metrics.jsonl").read_text().count('"loss"') == 2
