"""The layouts that the documents show: each composes, divides its model and its rows, and fits its GPUs."""

from __future__ import annotations

import re
import shlex

import pytest

from omni_train.recipe.compose import load_recipe, recipes_dir
from omni_train.recipe.schema import Recipe
from omni_train.recipe.validate import validate
from tests.support.memory import gibibytes

ROOT = recipes_dir().parent
MOST = 73.5  # GiB of an H100's 79.6: what is left is for fragments, and for rows of more media than the mean
STAGES = {
    "S1": ["s1_audio_adapter", "s1_audio_encoder", "s1_vision_adapter", "s1_vision_encoder"],
    "S2": ["s2_general"],
    "S3": ["s3_long_context"],
}


def table() -> list[list[str]]:
    """Rows of the table in docs/recipes.md: model, stage, layout, recomputation, GPUs, GiB."""
    text = (ROOT / "docs" / "recipes.md").read_text().split("## Layouts")[1].split("\n## ")[0]
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"
    ]
    return [row for row in rows if row[0] != "model="]


def recipes(model: str, stage: str, layout: str, recompute: str) -> list[Recipe]:
    name, *cut = re.findall(r"\w+_\w+|\d+", layout)
    words = [f"model={model}", f"parallel={name}", f"recompute={recompute}"]
    if cut:
        whole = load_recipe([f"model={model}"]).model
        letters = iter(whole.thinker.pattern * whole.thinker.repeats)
        pattern = "|".join("".join(next(letters) for _ in range(int(size))) for size in cut)
        assert not list(letters)
        words += ["model.thinker.repeats=1", f"model.thinker.pattern='{pattern}'"]
    return [load_recipe([f"stage={one}", *words]) for one in STAGES[stage]]


@pytest.mark.parametrize("row", table(), ids=" ".join)
def test_every_layout_of_the_table_divides_its_model_and_fits(row):
    gpus, said = int(row[4]), int(row[5])
    needed = []
    for recipe in recipes(*row[:4]):
        validate(recipe, world_size=gpus)
        needed.append(gibibytes(recipe, gpus))
    assert round(max(needed)) == said
    assert max(needed) < MOST


def test_the_table_and_the_recipes_have_the_same_layouts_and_say_the_same_of_them():
    files = {
        path.stem: " ".join(path.read_text().split()).replace(" # ", " ") for path in recipes_dir().glob("parallel/*")
    }
    del files["single"]
    named = {}
    for model, _, layout, _, gpus, size in table():
        named.setdefault(layout.split("`")[0], []).extend([model, f"{gpus}", f"{size} GiB"])
    assert set(named) == set(files)
    for name, facts in named.items():
        assert not [fact for fact in facts if fact not in files[name]], name
        assert "stimate" in files[name]
        ways = dict(re.findall(r"(tp|pp|cp|ep)(\d+)", name))
        parallel = load_recipe(["model=plus_397b_a17b", f"parallel={name}"]).parallel
        axes = {"tp": parallel.tensor, "pp": parallel.pipeline, "cp": parallel.context, "ep": parallel.expert}
        assert {axis: int(ways.get(axis, 1)) for axis in axes} == axes


def shown() -> list[tuple[str, str]]:
    """Commands with a large model that the documents show, with the file they stand in."""
    found = []
    for path in ("README.md", "docs/recipes.md", "docs/data.md", "launchers/slurm.sh"):
        text = (ROOT / path).read_text().replace("\\\n", " ")
        found += [
            (path, line.strip(" #"))
            for line in text.splitlines()
            if re.search(r"(launchers/|omni-train ).* model=(flash|plus)", line)
        ]
    return found


@pytest.mark.parametrize(("path", "line"), shown())
def test_what_the_documents_show_fits_the_gpus_it_is_shown_with(path, line):
    words = shlex.split(line.split("   (")[0])
    keys = [word for word in words if re.match(r"(stage|model|parallel|recompute|init_parts|data\.\w+)=", word)]
    recipe = load_recipe([key for key in keys if not key.startswith(("data.path", "init_parts"))])
    if "--cfg" in words:
        gpus = 64
    elif "slurm.sh" in line:
        gpus = 8 * int(re.search(r"--nodes[ =](\d+)", line)[1])
    else:
        gpus = int(re.search(r"launchers/local\.sh (\d+)", line)[1])
    validate(recipe, world_size=gpus)
    assert gibibytes(recipe, gpus) < MOST


def test_there_is_something_to_check():
    assert len(table()) >= 10
    assert len(shown()) >= 5


@pytest.mark.parametrize(
    ("words", "gpus"),
    [
        (["stage=s2_general", "model=flash_35b_a3b", "parallel=tp2_ep8"], 8),  # the states alone
        (["stage=s2_general", "model=flash_35b_a3b", "parallel=tp2_ep8", "recompute=selective"], 4096),
        (["stage=s3_long_context", "model=flash_35b_a3b", "parallel.context=8"], 64),
        (["stage=s2_general", "model=plus_122b_a10b", "parallel=tp2_pp4_cp2_ep8", "parallel.context=1"], 256),
        (["stage=s3_long_context", "model=plus_397b_a17b", "parallel=tp2_pp5_cp8_ep32"], 640),  # cut evenly
    ],
)
def test_what_did_not_fit_is_seen_not_to_fit(words, gpus):
    assert gibibytes(load_recipe(words), gpus) > MOST
