"""`omni-train train --help` in 80 columns, and the same tables in docs/recipes.md."""

from __future__ import annotations

import subprocess
import sys

import pytest

from omni_train.errors import UserError
from omni_train.recipe import help, tables
from omni_train.recipe.keys import described
from omni_train.recipe.schema import Recipe

GROUPS = [name for name, entry in described(Recipe).items() if entry.group]


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_of_a_group_has_all_that_is_in_it(group):
    shown = help.page(group)
    assert max(map(len, shown.splitlines())) <= 80
    flat = " ".join(shown.split())
    for name, entry in described(Recipe).items():
        if name.rpartition(".")[0] == group:
            assert f"\n  {name}{'  ' if entry.group else '='}" in shown and entry.help in flat


def test_the_first_page_has_recipes_the_keys_at_the_top_and_all_groups():
    shown = help.overview({"stage": ["a_stage", "another"], "model": ["tiny"]})
    assert max(map(len, shown.splitlines())) <= 80
    assert "\n  stage  a_stage, another\n  model  tiny\n" in shown
    for name, entry in described(Recipe).items():
        if "." not in name or entry.key.first:
            assert f"\n  {name}{' ' if entry.group else '='}" in shown
    assert "model.thinker" not in shown


def test_a_key_is_shown_with_default_type_bound_and_meaning():
    assert help.page("zero.stage") == (
        "  zero.stage=1  (integer, at least 0, at most 3)\n"
        "      0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too"
    )
    shown = {
        "schedule.steps": "schedule.steps=  (integer, at least 0, must be given)",
        "precision": "precision=bf16  (fp32 or bf16)",
        "optimizer.betas": "optimizer.betas=[0.9,0.95]  (list of numbers, each at least 0, below 1)",
        "trainable": "trainable=[*]  (list of texts, not empty)",
        "data.codec": "data.codec=null  (text or null)",
        "init_parts": "init_parts={}  (texts to texts)",
        "data.media.video_timestamps": "data.media.video_timestamps=true  (true or false)",
    }
    for name, head in shown.items():
        assert help.page(name).startswith(f"  {head}\n")


def test_another_name_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^--help nosuch: no such key or group of keys; groups are zero, .*, safety$"):
        help.page("nosuch")


def test_help_waits_for_no_torch():
    code = "import sys; from omni_train.cli import main\nmain()\nsys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "--help", "model.thinker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.thinker.num_experts=0" in done.stdout


def test_the_document_has_the_tables_of_the_schema():
    assert tables.main(["--check"]) == 0


def test_a_document_that_is_behind_is_named_and_renewed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "recipes.md"
    page.write_text(
        tables.PAGE.read_text().replace("| `zero.stage` | `1` |", "| `zero.stage` | `2` |") + "\nThe end.\n"
    )
    monkeypatch.setattr(tables, "PAGE", page)
    assert tables.main(["--check"]) == 1
    assert "run `make docs`" in capsys.readouterr().err
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    assert "| `zero.stage` | `1` |" in page.read_text() and page.read_text().endswith("\nThe end.\n")
