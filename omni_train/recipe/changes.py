"""Changes of a recipe on resume: keys that a run keeps from its first start to its end, and keys that may change.

What a checkpoint holds decides: a tensor, a moment, a place in the data cannot become another's. What is read anew at
every step (a rate, a weight of a loss, a layout) may change, and takes effect from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from omni_train.recipe.extensions import recipe_type
from omni_train.recipe.keys import Change, described
from omni_train.recipe.networks import in_groups, unused_groups
from omni_train.recipe.schema import EngineName, Recipe

_OWN_PLACE = ("run", "runs_dir")  # of a run that was moved: nothing to tell


class Difference(NamedTuple):
    """Difference of two recipes: a key with another value than the run was last started with."""

    key: str
    before: Any
    now: Any
    kind: Change


def differences(now: Recipe, before: Recipe) -> Iterator[Difference]:
    """Differences of a recipe from the one that a run was last started with, in the order of their keys."""
    ours, theirs = _flat(asdict(now)), _flat(asdict(before))
    unused = unused_groups(now.network)
    for key in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(key), theirs.get(key)
        if mine == its or key in _OWN_PLACE or (key.startswith("init_") and not mine):  # unused by a resumed run
            continue
        if in_groups(key, unused):
            continue
        kind = described(recipe_type())[key].change
        if key == "precision" and now.engine is EngineName.deepspeed:  # DeepSpeed's optimizers differ by precision
            kind = Change.kept
        yield Difference(key, its, mine, kind)


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries flattened to dotted keys; a model's layers are the same however their pattern is written."""
    if prefix == "model.thinker.":
        values["pattern"] = values["pattern"].replace("|", "") * values.pop("repeats")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and prefix + key != "init_parts"
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
