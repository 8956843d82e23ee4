"""Content hash of the part of a Thinker that makes the states a Talker reads, whatever layout wrote its checkpoint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from omni_train.checkpoint.integrity import DIGESTS, require_intact
from omni_train.checkpoint.reader import CheckpointReader
from omni_train.checkpoint.sharded import comparable, read_model_config
from omni_train.checkpoint.store import resolve
from omni_train.data.rows.codes import content_hash, is_hash
from omni_train.data.rows.stored_states import records
from omni_train.errors import UserError
from omni_train.recipe.schema import Recipe, Verify, required

_BELOW = re.compile(r"(embedding|audio_encoder|audio_adapter|vision_encoder|vision_adapter)\.|decoder\.layers\.(\d+)\.")
_PARTS = ("vocab_size", "layers", "thinker", "audio", "vision")


class _Below(Mapping[str, torch.Tensor]):
    """Tensors of a checkpoint up to a layer, each read when it is asked for."""

    def __init__(self, checkpoint: CheckpointReader, layers: int, reading: Callable[[], None]) -> None:
        self._checkpoint, self._reading = checkpoint, reading
        found = {name: _BELOW.match(name) for name in checkpoint.names}
        # A layer of the configuration is two of the stack: a mixer and a feed-forward.
        self._names = [name for name, at in found.items() if at and (at[1] or int(at[2]) < 2 * layers)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        self._reading()
        return self._checkpoint.read(name)


def thinker_hash(path: str, layers: int, reading: Callable[[], None] = lambda: None) -> str:
    """Content hash of a Thinker's embedding, encoders and first layers, which is all that their output depends on.

    The tensors are read one by one: memory for the largest is needed.

    Args:
        path: a checkpoint of network=thinker, or a run's latest; or already such a hash.
        layers: number of layers.
        reading: function that is called before each tensor.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or it holds no Thinker.
    """
    if is_hash(path):
        return path
    checkpoint = resolve(path)
    require_intact(checkpoint, Verify.all, only=("model.pt", ".metadata"), together=False)
    model = read_model_config(checkpoint)
    if model.thinker is None:
        raise UserError(f"talker_training.thinker={path}: no Thinker; give a checkpoint of network=thinker")
    first = (model.thinker.pattern.replace("|", "") * model.thinker.repeats)[: 2 * layers]
    thinker = replace(model.thinker, pattern=first, repeats=1, mtp_num_hidden_layers=0)
    settings = comparable(replace(model, thinker=thinker))
    config = {key: value for key, value in settings.items() if key.partition(".")[0] in _PARTS}
    return content_hash(_Below(CheckpointReader(checkpoint), layers, reading), config)


def checkpoint_digest(path: str) -> str | None:
    """SHA-256 of the list of a checkpoint's files and their digests; None of a hash, or where it has no such list."""
    if is_hash(path):
        return None
    file = resolve(path) / DIGESTS
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def stored_thinker(recipe: Recipe) -> str:
    """Content hash of the Thinker of a recipe of stored states.

    A checkpoint whose files are those that the states were made with is known by their digests, and is not read.

    Raises:
        UserError: as :func:`thinker_hash`, or a source has no states.
    """
    path = str(recipe.talker_training.thinker)
    written = [(record["checkpoint"], record["thinker"]) for record in records(recipe).values()]
    digest = checkpoint_digest(path)
    if digest is not None and all(one == (digest, written[0][1]) for one in written):
        return written[0][1]
    return thinker_hash(path, required(recipe.model.talker).accept_hidden_layer)
