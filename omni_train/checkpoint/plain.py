"""Checkpoints of whole networks, a ``NETWORK.safetensors`` each, which any program can open.

``NETWORK_ema.safetensors`` beside it has the averaged weights of a run that keeps them. Both engines read these files:
the ZeRO engine writes them, and a Thinker may start its audio encoder from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omni_train.checkpoint.integrity import reading
from omni_train.checkpoint.state_files import check_extra_states
from omni_train.errors import UserError

AVERAGED = "_ema"


def is_plain(checkpoint: Path) -> bool:
    """Whether a checkpoint holds whole networks rather than Megatron's shards."""
    return any(checkpoint.glob("*.safetensors"))


def write_networks(directory: Path, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write the tensors of each network into its own file."""
    for name, state in states.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, directory / f"{name}.safetensors", metadata={"format": "pt"})


def read_network(checkpoint: Path, name: str, averaged: bool = True) -> dict[str, torch.Tensor]:
    """Tensors of a network by name.

    Args:
        checkpoint: directory of the checkpoint.
        name: name of the network.
        averaged: whether to take the averaged weights where the checkpoint has them.

    Raises:
        UserError: the checkpoint has no such network, or is damaged.
    """
    path = checkpoint / f"{name}{AVERAGED}.safetensors"
    if not averaged or not path.exists():
        path = checkpoint / f"{name}.safetensors"
    if not path.exists():
        others = ", ".join(file.stem for file in _files(checkpoint)) or "none"
        raise UserError(
            f"{checkpoint}: has no network '{name}' but {others}: it is of another network= than what is asked for here"
        )
    return _read(path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    with reading(path):
        tensors = load_file(path)
    check_extra_states(path, tensors.items())
    return tensors


def tensors_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State of a network, without the entries of Megatron's layers that are no tensors."""
    return {key: value for key, value in network.state_dict().items() if isinstance(value, torch.Tensor)}


def check_shapes(checkpoint: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint in which a tensor has another shape; tensors that either side lacks are passed over.

    Raises:
        UserError: it names the first such tensor.
    """
    for key in sorted(wanted.keys() & found.keys()):
        here, there = tuple(wanted[key].shape), tuple(found[key].shape)
        if here != there:
            raise UserError(f"{checkpoint}: its {key} is {there}, the recipe's is {here}; choose the model of that run")


def read_plain_progress(checkpoint: Path) -> dict:
    """State of the trainer in a checkpoint.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    with reading(checkpoint / "progress.json"):
        return json.loads((checkpoint / "progress.json").read_text())


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint's networks, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for path in _files(checkpoint):
        with reading(path), safe_open(path, "pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's networks by name, without averaged weights."""
    return {key: value for path in _files(checkpoint) for key, value in _read(path).items()}


def load_from_plain(sharded: dict, checkpoint: Path) -> dict:
    """Megatron's sharded state with its tensors cut out of a checkpoint's whole tensors.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
        apply_factory_merges,
    )

    factories, _ = extract_matching_values(sharded, lambda entry: isinstance(entry, ShardedTensorFactory), True)
    apply_factories(sharded)
    files: dict[str, Any] = {}
    for path in _files(checkpoint):
        with reading(path):
            file = safe_open(path, "pt")
        files |= dict.fromkeys(file.keys(), file)

    def read(entry: Any) -> Any:
        if isinstance(entry, ShardedObject):
            return entry.data
        if not isinstance(entry, ShardedTensor):
            return entry
        if entry.key not in files:
            raise UserError(f"{checkpoint}: has no {entry.key}; choose the model it was trained with")
        part = files[entry.key].get_slice(entry.key)
        cut = tuple(
            slice(offset, offset + size)
            for offset, size in zip(entry.global_offset[entry.prepend_axis_num :], entry.local_shape, strict=True)
        )
        return part[cut].to(entry.dtype)

    return apply_factory_merges(dict_list_map_inplace(read, sharded), factories)


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.glob("*.safetensors")) if not path.stem.endswith(AVERAGED)]
