"""Tables of keys in docs/recipes.md, written from the schema: ``python -m omni_train.recipe.tables [--check]``."""

from __future__ import annotations

import sys

from omegaconf import MISSING

from omni_train.recipe.compose import PACKAGE
from omni_train.recipe.help import facts, written
from omni_train.recipe.keys import Entry, described
from omni_train.recipe.schema import Recipe

PAGE = PACKAGE.parent / "docs" / "recipes.md"
_BEGIN, _END = (
    "<!-- tables of keys: `make docs` writes them from omni_train/recipe/schema -->",
    "<!-- end of the tables -->",
)


def tables() -> str:
    """Tables in Markdown: of the keys at the top, and of each group."""
    keys = described(Recipe)
    groups = {"": [one for one in keys.values() if "." not in one.name]}
    for name, entry in keys.items():
        if entry.group:
            groups[name] = [one for one in keys.values() if one.name.rpartition(".")[0] == name]
    found = []
    for name, entries in groups.items():
        title = f"### `{name}`\n\n{keys[name].help}." if name else "### At the top"
        rows = "\n".join(_row(one) for one in entries if not one.group)
        found.append(f"{title}\n\n| key | default | must be | change | |\n|---|---|---|---|---|\n{rows}\n")
    return "\n".join(found)


def _row(entry: Entry) -> str:
    default = "" if entry.default == MISSING else f"`{written(entry.default)}`"
    kind = facts(entry).removesuffix(", must be given")
    cells = (f"`{entry.name}`", default, kind, entry.change, entry.help)
    return " | ".join(["", *(cell.replace("|", r"\|") for cell in cells), ""]).strip()


def renewed(page: str) -> str:
    """Page with its tables replaced by those of the schema."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n\n{tables()}\n{_END}{after}"


def main(arguments: list[str]) -> int:
    """Write the page; with ``--check`` only report whether it is up to date, by the exit status."""
    page = PAGE.read_text()
    if page == (now := renewed(page)):
        return 0
    if arguments == ["--check"]:
        print(f"{PAGE}: its tables of keys are not the schema's; run `make docs`", file=sys.stderr)
        return 1
    PAGE.write_text(now)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
