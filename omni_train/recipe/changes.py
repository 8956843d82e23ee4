"""What of a recipe a run keeps from its first start to its end, and what may change when it goes on.

What a checkpoint holds decides: a tensor, a moment, a place in the data cannot become another's. What is read anew at
every step (a rate, a weight of a loss, a layout) may change, and takes effect from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from typing import Any, NamedTuple

from omni_train.recipe.schema import EngineName, Recipe


class Kind(StrEnum):
    """What becomes of a run with another value of a key."""

    kept = "kept"  # it is refused
    learned = "learned"  # it goes on and learns otherwise; one that is complete is not what the recipe asks for
    free = "free"  # it learns the same


KINDS = {
    "stage": Kind.free,
    "run": Kind.free,
    "runs_dir": Kind.free,
    "seed": Kind.kept,  # rows, masks and windows are drawn from it
    "precision": Kind.learned,
    "network": Kind.kept,
    "engine": Kind.kept,
    "zero": Kind.kept,
    "recognition": Kind.learned,
    "recognition.beam": Kind.free,
    "recognition.eval_windows": Kind.free,
    "codec_training": Kind.learned,
    "codec_training.discriminators": Kind.kept,
    "codec_training.teacher": Kind.kept,
    "init_from": Kind.kept,
    "init_parts": Kind.kept,
    "trainable": Kind.kept,
    "recompute": Kind.free,
    "loss_chunk_tokens": Kind.free,
    "model": Kind.kept,
    "model.name": Kind.free,
    "model.initializer_range": Kind.free,
    "model.thinker.max_position_embeddings": Kind.free,
    "model.thinker.router_aux_loss_coef": Kind.learned,
    "model.thinker.mtp_loss_weight": Kind.learned,
    "model.audio.train_window_frames": Kind.learned,
    "model.audio.eval_window_frames": Kind.free,
    "parallel": Kind.free,
    "data": Kind.kept,
    "data.name": Kind.free,
    "data.path": Kind.free,  # what refers to it says where the data are
    "data.workers": Kind.free,
    "data.max_skip_fraction": Kind.free,
    "frozen": Kind.free,
    "optimizer": Kind.learned,
    "optimizer.name": Kind.kept,
    "optimizer.groups": Kind.kept,
    "optimizer.ema_decay": Kind.kept,
    "schedule": Kind.free,
    "evaluation": Kind.free,
    "checkpoint": Kind.free,
    "tracking": Kind.free,
    "safety": Kind.free,
}
"""Keys and groups of keys; the longest that fits decides."""

_OWN_PLACE = ("run", "runs_dir")  # of a run that was moved: nothing to tell


class Difference(NamedTuple):
    """A key with another value than a run was last started with."""

    key: str
    before: Any
    now: Any
    kind: Kind


def differences(now: Recipe, before: Recipe) -> Iterator[Difference]:
    """What a recipe changes of the one that a run was last started with, by key."""
    ours, theirs = _flat(asdict(now)), _flat(asdict(before))
    for key in sorted(ours.keys() | theirs.keys()):
        mine, its = ours.get(key), theirs.get(key)
        if mine == its or key in _OWN_PLACE or (key.startswith("init_") and not mine):  # which a resumed run needs not
            continue
        kind = kind_of(key)
        if key == "precision" and now.engine is EngineName.deepspeed:  # whose optimizers differ
            kind = Kind.kept
        yield Difference(key, its, mine, kind)


def kind_of(key: str) -> Kind:
    """What a dotted key is by :data:`KINDS`."""
    while key not in KINDS:
        key = key.rpartition(".")[0]
    return KINDS[key]


def _flat(values: dict, prefix: str = "") -> dict:
    """Nested dictionaries as one with dotted keys, a model's layers however their pattern is written."""
    if prefix == "model.thinker.":
        values["pattern"] = values["pattern"].replace("|", "") * values.pop("repeats")
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, dict) and prefix + key != "init_parts"
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
