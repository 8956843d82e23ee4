"""Megatron's sharded checkpoints: written by a thread while the run goes on, read in any layout."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from omni_train import platform
from omni_train.checkpoint.integrity import Digests, digests_of, read_digests, reading
from omni_train.checkpoint.plain import is_plain, load_from_plain, read_plain_progress
from omni_train.checkpoint.random_state import random_state, restore_random_state
from omni_train.checkpoint.state_files import read_state, write_state
from omni_train.checkpoint.store import Store, attempt, describe, step_of
from omni_train.errors import UserError, first_line
from omni_train.platform.agreement import agree, anywhere
from omni_train.recipe.extensions import model_type, recipe_type
from omni_train.recipe.keys import Change
from omni_train.recipe.keys import described as keys_of
from omni_train.recipe.old_names import model_of_today
from omni_train.recipe.schema import CheckpointConfig, ModelConfig

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

    from omni_train.checkpoint.sharded_write import Plan, Write

_STACKS = {"layers": "thinker", "talker_layers": "talker"}
"""Name of the layers of each stack in descriptions of a model -> the part that has them."""
# Errors that libraries raise on damaged files.
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError)


def read_progress(checkpoint: Path) -> dict:
    """The `progress` that :meth:`CheckpointStore.save` was given; needs no process groups.

    Raises:
        DamagedCheckpoint: it cannot be read.
    """
    if is_plain(checkpoint):
        return read_plain_progress(checkpoint)
    from megatron.core.dist_checkpointing import load_common_state_dict

    from omni_train.checkpoint.sharded_files import as_data

    with reading(checkpoint / ".metadata"), as_data(checkpoint):
        return load_common_state_dict(checkpoint)["progress"]


def model_state(chunks: list[torch.nn.Module]) -> dict:
    """Sharded state of this rank's model chunks, keyed as the optimizer expects them."""
    metadata = state_metadata()
    keyed: dict[str, Any] = _keyed(chunks)  # Megatron's modules, beyond what torch's type promises
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in keyed.items()}


def check_sharding(chunks: list[torch.nn.Module]) -> None:
    """Refuse a model that would be written wrongly: every tensor-parallel rank has a part of a parameter, and the state
    says that each has all of it. Megatron's default does so for what stands in a plain container, a ``ModuleList`` say.

    Raises:
        TypeError: naming the parameter.
    """
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    ways, expert_ways = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    if ways == expert_ways == 1:
        return
    states = model_state(chunks)
    for key, chunk in _keyed(chunks).items():
        for name, parameter in chunk.named_parameters():
            of_expert = not getattr(parameter, "allreduce", True)  # as Megatron marks them
            split = getattr(parameter, "tensor_model_parallel", False) and (expert_ways if of_expert else ways) > 1
            entry = states[key].get(name)
            whole = isinstance(entry, ShardedTensor) and tuple(entry.global_shape) == tuple(parameter.shape)
            if whole and split:
                raise TypeError(
                    f"{name}: is split among tensor-parallel ranks, and sharded_state_dict of {type(chunk).__name__} "
                    "says that it is not; give the module that holds it a sharded_state_dict"
                )


def _keyed(chunks: list[torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """This rank's model chunks, unwrapped, under the keys that Megatron's optimizer looks for."""
    unwrapped = [getattr(chunk, "module", chunk) for chunk in chunks]
    return {"model": unwrapped[0]} if len(unwrapped) == 1 else {f"model{i}": chunk for i, chunk in enumerate(unwrapped)}


def state_metadata() -> dict:
    """Megatron's metadata of sharded states: formats that do not depend on the layout that wrote them."""
    from megatron.core import parallel_state

    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": platform.has_cuda(),
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def load_model(chunks: list[torch.nn.Module], checkpoint: Path, model: ModelConfig) -> None:
    """Load the model's parameters from a checkpoint written in any layout. Collective.

    Args:
        chunks: this rank's model chunks.
        checkpoint: directory of the checkpoint.
        model: the model that the checkpoint must hold.

    Raises:
        UserError: the checkpoint is of another architecture, or incomplete.
    """
    check_architecture(checkpoint, model)
    state = load_sharded(model_state(chunks), checkpoint)
    apply_model_state(chunks, state)


def apply_model_state(chunks: list[torch.nn.Module], state: dict, strict: bool = True) -> None:
    """Load into model chunks what :func:`load_sharded` read; with `strict` no tensor may be missing."""
    for key, chunk in _keyed(chunks).items():
        chunk.load_state_dict(state.get(key, {}), strict=strict)


def load_sharded(sharded: dict, checkpoint: Path) -> dict:
    """Read the tensors of a sharded state, or of a part of it, from a checkpoint of any layout. Collective.

    Raises:
        UserError: a tensor is not in the checkpoint, or the checkpoint is damaged.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from omni_train.checkpoint.sharded_files import as_data

    if is_plain(checkpoint):
        return load_from_plain(sharded, checkpoint)
    try:
        with as_data(checkpoint):
            return dist_checkpointing.load(sharded, str(checkpoint))
    except (CheckpointingException, *_UNREADABLE) as error:
        if "optimizer.state." in str(error):
            raise UserError(
                f"{checkpoint}: its optimizer state is not of what this run trains; take the optimizer= and trainable= "
                f"of the run that wrote it, or start a new run with init_from={checkpoint}"
            ) from error
        raise UserError(f"{checkpoint}: this checkpoint cannot be read, use another: {first_line(error)}") from error


def read_model_config(checkpoint: Path) -> ModelConfig:
    """Configuration of the model that a checkpoint holds.

    Raises:
        UserError: the checkpoint's ``model.pt`` is not there, damaged, or of a model that is not known.
    """
    written = model_of_today(read_state(checkpoint / "model.pt"))
    kind = model_type()
    found = {}
    for key, entry in keys_of(kind).items():
        if key in written:  # no dotted one is
            value = written[key]
            found[key] = _group(entry.group, value) if entry.group and value else value
    return kind(**found)


def _group(kind: Any, values: dict[str, Any]) -> Any:
    """Group of a model from what a checkpoint holds of it, with the groups inside."""
    found = {}
    for key, value in values.items():
        entry = keys_of(kind).get(key)
        if entry is not None and entry.group and value:
            value = _group(entry.group, value)
        elif entry is not None and isinstance(entry.type, type) and issubclass(entry.type, StrEnum):
            value = entry.type(value)
        found[key] = value
    return kind(**found)


def check_architecture(checkpoint: Path, model: ModelConfig, modules: set[str] | None = None) -> None:
    """Refuse a checkpoint whose model is not the recipe's.

    Args:
        modules: modules that are taken from it; None for the whole model.

    Raises:
        UserError: it names the first key that differs.
    """
    written, wanted = comparable(read_model_config(checkpoint)), comparable(model)
    compared: tuple[str, ...]
    if modules is None:
        compared = ("vocab_size", "layers", "thinker", "talker", "talker_layers", "audio", "vision")
    else:  # for other modules the shapes of their tensors are checked
        stack = ("layers", "thinker") if wanted["talker"] is None else ("talker_layers", "talker")
        compared = ("vocab_size", *stack) if "decoder" in modules else ()
        compared += tuple(name for name in ("audio", "vision") if f"{name}_encoder" in modules and written[name])
    keys = {key for key in written | wanted if key.partition(".")[0] in compared}
    if modules is not None:
        keys.discard("thinker.mtp_num_hidden_layers")
    for key in sorted(keys):
        if written.get(key) != wanted.get(key):
            raise UserError(
                f"{checkpoint}: a checkpoint of another architecture: its model.{key} is {written.get(key)}, the "
                f"recipe's is {wanted.get(key)}; choose the model it was trained with"
            )


def comparable(model: ModelConfig) -> dict[str, Any]:
    """Values of the keys that decide the shapes and the meaning of tensors, by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in described(model).items():
        flat[name] = "there" if isinstance(value, dict) else value
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {}
    for part in _STACKS.values():  # `layers` says the same however it is written
        flat.pop(f"{part}.pattern", None)
        flat.pop(f"{part}.repeats", None)
    # A key that may change when a run goes on changes no tensor's shape or meaning.
    keys = keys_of(recipe_type())
    return {key: flat[key] for key in flat if f"model.{key}" not in keys or keys[f"model.{key}"].change is Change.kept}


def described(model: ModelConfig) -> dict[str, Any]:
    """Model as a checkpoint describes it; `layers` is the same however the pattern is written."""
    stacks = {name: getattr(model, part) for name, part in _STACKS.items()}
    layers = {name: "" if one is None else one.pattern.replace("|", "") * one.repeats for name, one in stacks.items()}
    return _plain(asdict(model)) | layers


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values with the names of enumerations in the place of their members, which checkpoints do not hold."""
    return {
        key: _plain(value) if isinstance(value, dict) else str(value) if isinstance(value, StrEnum) else value
        for key, value in values.items()
    }


class CheckpointStore(Store):
    """Store of the checkpoints of one run of the Megatron engine."""

    def __init__(self, directory: Path, config: CheckpointConfig, model: ModelConfig) -> None:
        self.model = model
        self.carried: Path | None = None  # a folder that every checkpoint has a copy of, as its `hf`
        self._carried_digests: Digests = {}
        self._writing: tuple[Path, Path, Digests, Plan, Write] | None = None
        super().__init__(directory, config)

    def save(
        self,
        step: int,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer | None,
        progress: dict,
        loader_state: Any,
        state: dict | None = None,
    ) -> None:
        """Start writing a checkpoint; it counts once :meth:`finish` has seen it complete. Collective.

        Args:
            step: optimizer steps done.
            chunks: this rank's model chunks.
            optimizer: Megatron's optimizer, None to write the model alone.
            progress: state of the trainer; equal on all ranks.
            loader_state: state of this data rank's loader, None on ranks that do not load.
            state: sharded state of the model to write; None for that of `chunks`.
        """
        from omni_train.checkpoint.sharded_write import Write, plan, staged

        self.finish(blocking=True)
        paths = self._begin(step)
        if paths is None:
            return
        partial, final = paths
        digests: Digests = {}
        if problem := agree(attempt(lambda: digests.update(self._write_small(partial, loader_state)))):
            self._failed(final, problem)
            return
        state = model_state(chunks) if state is None else state
        if optimizer is not None and step > 0:  # before its first step it has no state
            state["optimizer"] = optimizer.sharded_state_dict(state, metadata=state_metadata())
        state["progress"] = progress
        planned = plan(state, partial, check=step == 0)
        write = Write(staged(planned.buckets))
        planned.buckets.clear()
        self._writing = (partial, final, digests, planned, write)
        write.start()
        if not self.config.asynchronous:
            self.finish(blocking=True)

    def _write_small(self, partial: Path, loader_state: Any) -> Digests:
        """Write this rank's states that are no tensors, random and loader state; returns their digests."""
        names = self._write_loader(partial, loader_state)
        names.append(f"random_{platform.rank():05d}.pt")
        write_state(partial / names[-1], random_state())
        carried: Digests = {}
        if platform.rank() == 0:
            names.append("model.pt")
            write_state(partial / names[-1], described(self.model))
            if self.carried is not None:
                shutil.copytree(self.carried, partial / "hf", copy_function=_link)
                carried = self._carried_digests  # of the files as they were, so that later damage shows
        return digests_of(partial, names) | carried

    def finish(self, blocking: bool = False) -> None:
        """Complete a checkpoint whose files are written; with `blocking`, wait for them. Collective."""
        if self._writing is None:
            return
        partial, final, digests, planned, write = self._writing
        if blocking:
            write.join()
        if anywhere(write.is_alive()):
            return
        self._writing = None
        if problem := agree(None if write.error is None else describe(write.error)):
            self._failed(final, problem)
            return
        from omni_train.checkpoint.sharded_write import seal

        digests |= write.digests
        self._complete(partial, final, digests, write.results, lambda results: seal(planned, partial, results))

    def abandon(self) -> None:
        """Stop a write that is under way, if any. Not collective: for a run that ends by an error."""
        if self._writing is not None:
            self._writing[-1].cancel()
            self._writing = None

    def _completed(self, final: Path) -> None:
        self.carry_from(final)  # the checkpoint that it came from may be pruned
        super()._completed(final)

    def carry_from(self, checkpoint: Path) -> None:
        """Copy what an import left in a checkpoint (tokenizer, configuration) into all that this store will write."""
        carried = checkpoint / "hf"
        self.carried = carried if carried.is_dir() else None
        written = (read_digests(checkpoint) or {}) if self.carried else {}
        self._carried_digests = {name: digest for name, digest in written.items() if name.startswith("hf/")}

    def load(self, checkpoint: Path, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> dict:
        """Load model, optimizer and random state. Collective.

        Returns:
            the `progress` that :meth:`save` was given.
        """
        from omni_train.checkpoint.distributed_optimizer import restore

        check_architecture(checkpoint, self.model)
        self.carry_from(checkpoint)
        state = model_state(chunks)
        stepped = step_of(checkpoint) > 0
        if stepped:
            state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=state_metadata())
        state = load_sharded(state, checkpoint)
        apply_model_state(chunks, state)
        if stepped:
            restore(optimizer, state["optimizer"], checkpoint)
        else:
            optimizer.reload_model_params()
        restore_random_state(checkpoint)
        return state["progress"]


def _link(source: str, target: str) -> None:
    """Link a file under another name, as it may be gigabytes; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
