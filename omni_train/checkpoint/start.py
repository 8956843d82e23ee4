"""Initialisation of a fresh run's parameters: from one checkpoint, from several, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from omni_train.checkpoint.integrity import require_intact
from omni_train.checkpoint.plain import check_shapes, is_plain, shapes, tensors_of, whole_tensors
from omni_train.checkpoint.sharded import apply_model_state, check_architecture, load_sharded, model_state
from omni_train.checkpoint.store import resolve
from omni_train.errors import UserError
from omni_train.platform.logs import say
from omni_train.recipe.networks import held
from omni_train.recipe.schema import Recipe

RANDOM = "random"
"""In `init_parts`: the fresh initialisation, drawn from the recipe's seed."""


def initialize(chunks: list[torch.nn.Module], recipe: Recipe) -> Path | None:
    """Initialize a model as the recipe's `init_from` and `init_parts` say, and log what came from where. Collective.

    A parameter that no pattern of `init_parts` matches comes from `init_from`; without it, it is fresh. Checkpoints may
    be of any layout, and of models that have only the parts taken from them.

    Args:
        chunks: this rank's model chunks.
        recipe: a validated recipe.

    Returns:
        the checkpoint of `init_from`, None without one.

    Raises:
        UserError: a path without a checkpoint, a damaged one, a part of another architecture, a parameter that its
            checkpoint does not have, or a pattern that matches no parameter.
    """
    state = model_state(chunks)
    keys = {entry.key for chunk in state.values() for entry in chunk.values()}
    for checkpoint, taken in _sources(recipe, _of_all_ranks(keys)):
        check_architecture(checkpoint, held(recipe), {key.partition(".")[0] for key in taken})
        wanted = {
            name: {local: entry for local, entry in chunk.items() if entry.key in taken}
            for name, chunk in state.items()
        }
        _check_tensors(wanted, checkpoint)
        apply_model_state(chunks, load_sharded(wanted, checkpoint), strict=False)
    return resolve(recipe.init_from) if recipe.init_from else None


def initialize_networks(networks: Mapping[str, torch.nn.Module], recipe: Recipe) -> None:
    """Initialize the whole networks of the ZeRO engine as :func:`initialize` does, from checkpoints that it wrote.

    Raises:
        UserError: as :func:`initialize`, or a checkpoint of the Megatron engine.
    """
    states = {name: tensors_of(network) for name, network in networks.items()}
    alone = len(networks) == 1
    places = {(key if alone else f"{name}.{key}"): (name, key) for name, state in states.items() for key in state}
    for checkpoint, taken in _sources(recipe, sorted(places), depth=1 if alone else 2):
        if not is_plain(checkpoint):
            raise UserError(f"{checkpoint}: was written by engine=megatron; give one of network={recipe.network}")
        found = whole_tensors(checkpoint)
        if missing := [name for name in taken if places[name][1] not in found]:
            known = {places[name][0] for name in taken if places[name][1] in found}
            parts = [name for name in missing if places[name][0] in known and not alone]
            rest = [name for name in missing if name not in parts]  # of networks that the checkpoint lacks entirely
            raise _missing(checkpoint, missing[0], [*_modules(rest, 1), *_modules(parts, 2)])
        for name, state in states.items():
            keys = [key for whose, key in (places[one] for one in taken) if whose == name]
            check_shapes(checkpoint, {key: state[key] for key in keys}, found)
            networks[name].load_state_dict({key: found[key] for key in keys}, strict=False)


def _sources(recipe: Recipe, keys: list[str], depth: int = 1) -> Iterator[tuple[Path, list[str]]]:
    """(checkpoint, keys to take from it) of each checkpoint that the recipe starts from; logs each when it was read.

    Collective: each is verified first. What a person named is not replaced by another when it is damaged.

    Args:
        depth: words of a key that name its module.
    """
    base = resolve(recipe.init_from) if recipe.init_from else None
    parts = {pattern: None if source == RANDOM else resolve(source) for pattern, source in recipe.init_parts.items()}
    origin = _origins(keys, base, parts)
    for checkpoint in dict.fromkeys([base, *parts.values()]):
        taken = [key for key in keys if origin[key] == checkpoint]
        if not taken:
            continue
        if checkpoint is not None:
            require_intact(checkpoint, recipe.checkpoint.verify)
            yield checkpoint, taken
        modules = ", ".join(_modules(taken, depth))
        say(f"starting {'fresh' if checkpoint is None else f'from {checkpoint}'}: {modules}")


def _modules(keys: Iterable[str], depth: int) -> list[str]:
    return sorted({".".join(key.split(".")[:depth]) for key in keys})


def _missing(checkpoint: Path, key: str, modules: list[str]) -> UserError:
    fresh = ",".join(f"{module}.*:{RANDOM}" for module in modules)
    return UserError(
        f"{checkpoint}: has no {key}; 'init_parts={{{fresh}}}' starts what is missing fresh, "
        f"a checkpoint in place of {RANDOM} takes it from there"
    )


def _of_all_ranks(values: set) -> list:
    everywhere: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, values)
    return sorted(set().union(*everywhere))


def _origins(keys: list[str], base: Path | None, parts: dict[str, Path | None]) -> dict[str, Path | None]:
    """Checkpoint that each tensor of the model comes from, None being its fresh initialisation."""
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

    from omni_train.checkpoint.sharded_files import as_data

    if is_plain(checkpoint):
        written = shapes(checkpoint)
    else:
        with as_data(checkpoint):
            written = {key: tensor.global_shape for key, tensor in load_tensors_metadata(str(checkpoint)).items()}
    entries = [entry for chunk in wanted.values() for entry in chunk.values()]
    built = [entry.build() if isinstance(entry, ShardedTensorFactory) else [entry] for entry in entries]
    tensors = [tensor for part in built for tensor in nested_values(part) if isinstance(tensor, ShardedTensor)]
    missing = _of_all_ranks({tensor.key for tensor in tensors if tensor.key not in written})
    if missing:
        raise _missing(checkpoint, missing[0], _modules(missing, 1))
    both = {(tensor.key, written[tensor.key], tensor.global_shape) for tensor in tensors}
    for key, there, here in _of_all_ranks({(key, there, here) for key, there, here in both if there != here}):
        raise UserError(
            f"{checkpoint}: its {key} is {there}, the recipe's is {here}; choose the model it was trained with"
        )
