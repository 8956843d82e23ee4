"""What a fresh run's parameters start from: one checkpoint, several, or their fresh initialisation."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch

from omni_train.errors import UserError
from omni_train.platform.logs import say
from omni_train.recipe.schema import Recipe
from omni_train.training.checkpoint import apply_model_state, check_architecture, load_sharded, model_state, resolve

RANDOM = "random"
"""In `init_parts`: the fresh initialisation, drawn from the recipe's seed."""


def initialize(chunks: list[torch.nn.Module], recipe: Recipe) -> Path | None:
    """Fill a model as the recipe's `init_from` and `init_parts` say, and say what started where. Collective.

    A parameter that no pattern of `init_parts` matches comes from `init_from`; without it, it is fresh. Checkpoints may
    be of any layout, and of models that have only the parts taken from them.

    Args:
        chunks: this rank's model chunks.

    Returns:
        the checkpoint of `init_from`.

    Raises:
        UserError: a path without a checkpoint, a part of another architecture, a parameter that its checkpoint does not
            have, or a pattern that matches no parameter.
    """
    base = resolve(recipe.init_from) if recipe.init_from else None
    parts = {pattern: None if source == RANDOM else resolve(source) for pattern, source in recipe.init_parts.items()}
    state = model_state(chunks)
    keys = {entry.key for chunk in state.values() for entry in chunk.values()}
    origin = _origins(_of_all_ranks(keys), base, parts)
    for checkpoint in dict.fromkeys([base, *parts.values()]):
        taken = {key for key, source in origin.items() if source == checkpoint}
        if checkpoint is not None and taken:
            check_architecture(checkpoint, recipe.model, {key.partition(".")[0] for key in taken})
            wanted = {
                name: {local: entry for local, entry in chunk.items() if entry.key in taken}
                for name, chunk in state.items()
            }
            _check_tensors(wanted, checkpoint)
            apply_model_state(chunks, load_sharded(wanted, checkpoint), strict=False)
        if taken:
            modules = ", ".join(sorted({key.partition(".")[0] for key in taken}))
            say(f"starting {'fresh' if checkpoint is None else f'from {checkpoint}'}: {modules}")
    return base


def _of_all_ranks(values: set) -> list:
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, values)
    return sorted(set().union(*everywhere))


def _origins(keys: list[str], base: Path | None, parts: dict[str, Path | None]) -> dict[str, Path | None]:
    """Where each tensor of the model comes from, None being its fresh initialisation."""
    first = {key: next((pattern for pattern in parts if fnmatchcase(key, pattern)), None) for key in keys}
    for pattern in parts:
        if pattern not in first.values():
            raise UserError(
                f"init_parts: the pattern '{pattern}' is the first match of no parameter; correct it or leave it out"
            )
    return {key: base if pattern is None else parts[pattern] for key, pattern in first.items()}


def _check_tensors(wanted: dict, checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks a wanted tensor or has it in another shape, before reading any. Collective."""
    from megatron.core.dist_checkpointing import load_tensors_metadata
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    entries = [entry for chunk in wanted.values() for entry in chunk.values()]
    built = [entry.build() if isinstance(entry, ShardedTensorFactory) else [entry] for entry in entries]
    tensors = [tensor for part in built for tensor in nested_values(part) if isinstance(tensor, ShardedTensor)]
    written = load_tensors_metadata(str(checkpoint))
    missing = _of_all_ranks({tensor.key for tensor in tensors if tensor.key not in written})
    if missing:
        fresh = ",".join(f"{module}.*:{RANDOM}" for module in sorted({key.partition(".")[0] for key in missing}))
        raise UserError(
            f"{checkpoint}: has no {missing[0]}; 'init_parts={{{fresh}}}' starts what is missing fresh, "
            f"a checkpoint in place of {RANDOM} takes it from there"
        )
    shapes = {(tensor.key, written[tensor.key].global_shape, tensor.global_shape) for tensor in tensors}
    for key, there, here in _of_all_ranks({(key, there, here) for key, there, here in shapes if there != here}):
        raise UserError(
            f"{checkpoint}: its {key} is {there}, the recipe's is {here}; choose the model it was trained with"
        )
