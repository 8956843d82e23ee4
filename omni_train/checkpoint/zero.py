"""The ZeRO engine's checkpoints: whole networks to open anywhere, and each rank's share of the optimizers to resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.checkpoint.integrity import Digests, damaged, digests_of, reading
from omni_train.checkpoint.plain import (
    check_shapes,
    is_plain,
    read_network,
    read_plain_progress,
    tensors_of,
    write_networks,
)
from omni_train.checkpoint.random_state import random_state, restore_random_state
from omni_train.checkpoint.sharded import described
from omni_train.checkpoint.state_files import check_extra_states, load_plain, write_state
from omni_train.checkpoint.store import Store, attempt, step_of
from omni_train.errors import UserError
from omni_train.platform.agreement import agree
from omni_train.recipe.schema import CheckpointConfig, ModelConfig

_SHARES = "zero"


Engines = Mapping[str, Any]
"""DeepSpeed's engine of each network."""
Tensors = Mapping[str, Mapping[str, torch.Tensor]]
"""The state of each network."""


@dataclass(frozen=True)
class Layout:
    """Layout in which optimizer states are sharded over ranks: a run in another layout cannot read them."""

    ranks: int
    zero_stage: int


class ZeroStore(Store):
    """Store of the checkpoints of one run of the ZeRO engine."""

    def __init__(self, directory: Path, config: CheckpointConfig, model: ModelConfig) -> None:
        super().__init__(directory, config)
        self.model = model

    def save(
        self, step: int, states: Tensors, engines: Engines, layout: Layout, progress: dict, loader_state: Any
    ) -> None:
        """Write a checkpoint. Collective.

        Args:
            step: optimizer steps done.
            states: whole tensors of the networks; averaged weights under ``NETWORK_ema``.
            engines: DeepSpeed's engines, of whose optimizers each rank writes its shard.
            layout: layout in which the optimizers are sharded.
            progress: state of the trainer; equal on all ranks.
            loader_state: state of this rank's loader.
        """
        paths = self._begin(step)
        if paths is None:
            return
        partial, final = paths
        shares = _shares(engines, partial / _SHARES) if step > 0 else {}  # before its first step there is no state
        digests: Digests = {}

        def write() -> None:
            names = self._write_loader(partial, loader_state)
            if platform.rank() == 0:
                write_networks(partial, states)
                write_state(partial / "model.pt", described(self.model))
                (partial / "progress.json").write_text(json.dumps(progress))
            names.append(f"random_{platform.rank():05d}.pt")
            write_state(partial / names[-1], random_state())
            for path, share in shares.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(share, path)
                names.append(str(path.relative_to(partial)))
            digests.update(digests_of(partial, names))

        def seal(_: list) -> None:
            (partial / "metadata.json").write_text(json.dumps(asdict(layout)))

        if problem := agree(attempt(write)):
            self._failed(final, problem)
        else:
            self._complete(partial, final, digests, seal=seal)

    def check(self, checkpoint: Path, layout: Layout) -> None:
        """Refuse a checkpoint that a run in this layout cannot resume from.

        Raises:
            UserError: another engine, another number of ranks or another stage of ZeRO wrote it.
        """
        if not is_plain(checkpoint):
            raise UserError(f"{checkpoint}: was written by engine=megatron; give another run=, or init_from")
        written = json.loads((checkpoint / "metadata.json").read_text())
        if written != asdict(layout):
            raise UserError(
                f"{checkpoint}: was written by {written['ranks']} ranks with zero.stage={written['zero_stage']}, not "
                f"{layout.ranks} with {layout.zero_stage}; resume as it was, or start a new run with init_from"
            )

    def load(self, checkpoint: Path, engines: Engines) -> dict:
        """Load optimizers and random state, for networks that have their weights from the same checkpoint.

        Returns:
            the `progress` that :meth:`save` was given.
        """
        if step_of(checkpoint) > 0:
            for name, one in engines.items():
                one.checkpoint_engine.load = _read_share
                one._get_all_ckpt_names = lambda folder, tag, one=one: [one._get_ckpt_name(folder, tag)]  # no patterns
                with reading(checkpoint / _SHARES):
                    path, _ = one.load_checkpoint(str(checkpoint / _SHARES), tag=name)
                if path is None:
                    raise damaged(checkpoint, f"{_SHARES}/{name} is missing")
        restore_random_state(checkpoint)
        return read_plain_progress(checkpoint)


def _shares(engines: Engines, folder: Path) -> dict[Path, dict]:
    """States that DeepSpeed would write on this rank, by the file that it would write each to. Collective.

    DeepSpeed writes between collectives, and would leave the other ranks waiting for one whose disk is full.
    """
    shares: dict[Path, dict] = {}
    for name, one in engines.items():
        writer, one.checkpoint_engine = one.checkpoint_engine, _Collector(shares)
        one._copy_recovery_script = lambda folder: None  # our checkpoints hold whole networks already
        one.save_checkpoint(str(folder), tag=name, save_latest=False)
        one.checkpoint_engine = writer
    return shares


class _Collector:
    """Collector in the place of DeepSpeed's writer of checkpoints, which keeps the states instead of writing them."""

    def __init__(self, files: dict[Path, dict]) -> None:
        self.files = files

    def save(self, state_dict: dict, path: str) -> None:
        self.files[Path(path)] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Later."""

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True  # as torch.save does

    create = commit = lambda self, info: None


def _read_share(path: str, map_location: Any = None) -> dict:
    """Shard of this rank that DeepSpeed wrote; in the place of its own reading, which runs what is in a file.

    Raises:
        Exception: as :func:`load_plain` raises it.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    share = load_plain(path, path, LossScaler, ZeroStageEnum, fragment_address)
    check_extra_states(path, (share.get("module") or {}).items())
    return share


def fill(network: torch.nn.Module, checkpoint: Path, name: str) -> None:
    """Load the tensors of a checkpoint into a network that is not yet sharded.

    Raises:
        UserError: it names the first tensor that does not fit.
    """
    wanted, found = tensors_of(network), read_network(checkpoint, name, averaged=False)
    if other := sorted(wanted.keys() ^ found.keys()):
        raise UserError(f"{checkpoint}: {other[0]} is not both there and in the recipe; choose the model of that run")
    check_shapes(checkpoint, wanted, found)
    network.load_state_dict(found)
