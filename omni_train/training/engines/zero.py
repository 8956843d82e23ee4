"""The ZeRO engine: one optimizer step over a global batch of rows, on data ranks alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.checkpoint.plain import AVERAGED, read_network
from omni_train.checkpoint.start import initialize_networks
from omni_train.checkpoint.zero import Layout, ZeroStore, fill
from omni_train.errors import UserError
from omni_train.objectives.base import GlobalBatch
from omni_train.recipe.schema import Recipe
from omni_train.training.engines.base import Engine, StepResult, global_sums
from omni_train.training.engines.deepspeed import forget_groups, import_deepspeed, skip_next_step, wrap
from omni_train.training.engines.gradients import Arrivals, Finite
from omni_train.training.engines.metrics import Totals
from omni_train.training.engines.optimizer import freeze, parameter_groups, set_learning_rate
from omni_train.training.engines.zero_parameters import full_shape, named_parameters, shard, share_of, whole


class ZeroEngine(Engine):
    """Networks, each with its optimizer, on DeepSpeed's ZeRO; every rank of the world is a data rank."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.networks: Mapping[str, torch.nn.Module] = self.spec.build(recipe, self.frozen)
        self.objective = self.spec.objective(recipe, self.networks, self.frozen)
        named = list(named_parameters(self.networks))
        freeze(named, recipe.trainable)
        for name, network in self.networks.items():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                raise UserError(f"trainable: matches nothing of {name}; add '{name}.*'")
        self._arrivals = {name: Arrivals(self._named(name)) for name in self.networks}
        self._finite = Finite(named)
        self.parameters = sum(parameter.numel() for _, parameter in named)
        self._totals = Totals(torch.float64)
        for network in self.networks.values():
            for tensor in (*network.parameters(), *network.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)
        self.decay = recipe.optimizer.ema_decay
        self._averages: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._plain: Mapping[str, torch.nn.Module] | None = None
        self.engines: dict[str, Any] = {}

    def start(self) -> None:
        """Wrap the networks by DeepSpeed, once they have the parameters that they start from."""
        deepspeed, optimizer = import_deepspeed(), self.recipe.optimizer
        for name, network in self.networks.items():
            groups = parameter_groups(optimizer, self._named(name))
            self.engines[name] = wrap(deepspeed, self.recipe, network, groups)
        if self.decay:
            self._averages = {parameter: shard(parameter).float().clone() for parameter in self._averaged()}

    def _named(self, name: str) -> Iterator:
        return named_parameters({name: self.networks[name]}, alone=len(self.networks) == 1)

    def _averaged(self) -> Iterator[torch.nn.Parameter]:
        for network in self.networks.values():
            yield from (parameter for parameter in network.parameters() if parameter.requires_grad)

    def open_store(self, directory: Path) -> ZeroStore:
        return ZeroStore(directory, self.recipe.checkpoint, self.recipe.model)

    def initialize(self, store: ZeroStore) -> None:
        if self.recipe.init_from or self.recipe.init_parts:
            initialize_networks(self.networks, self.recipe)
        self.start()

    def resume(self, store: ZeroStore, checkpoint: Path) -> dict:
        store.check(checkpoint, self._layout())
        for name, network in self.networks.items():
            fill(network, checkpoint, name)
        self.start()
        progress = store.load(checkpoint, self.engines)
        self.restore_averages(checkpoint)
        self._keep_settings()
        return progress

    def _keep_settings(self) -> None:
        """Restore the recipe's optimizer settings, which DeepSpeed has replaced by those of the checkpoint."""
        config = self.recipe.optimizer
        for engine in self.engines.values():
            engine.optimizer.clip_grad = config.clip_grad
            for group in engine.optimizer.param_groups:
                group["betas"], group["eps"] = tuple(config.betas), config.eps

    def save(self, store: ZeroStore, step: int, progress: dict, loader_state: Any) -> None:
        states = self.states()
        if self.decay:
            states |= {name + AVERAGED: state for name, state in self.states(averaged=True).items()}
        store.save(step, states, self.engines, self._layout(), progress, loader_state)

    def _layout(self) -> Layout:
        return Layout(torch.distributed.get_world_size(), self.recipe.zero.stage)

    def restore_averages(self, checkpoint: Path) -> None:
        """Load the averaged weights of a checkpoint, where this run keeps them."""
        if not self.decay:
            return
        for name, network in self.networks.items():
            tensors = read_network(checkpoint, name)
            for key, parameter in network.named_parameters():
                if parameter in self._averages:
                    self._averages[parameter].copy_(share_of(parameter, tensors[key]))

    def train_step(self, rows: list, learning_rate: float, step: int = 0) -> StepResult:
        world = torch.distributed.get_world_size()
        sums = global_sums(self.objective, rows, strata=self.recipe.data.strata)
        batch = GlobalBatch(max(sums.weight, 1.0), step, training=True)
        rows = self.prepared(rows)
        for engine in self.engines.values():
            engine.train()
            set_learning_rate(engine.optimizer.param_groups, learning_rate, self.recipe.optimizer.weight_decay)
        self._finite.begin_step()
        outcomes = []
        for row in rows:
            outcome = self.objective.run(self.engines, to_device(row), batch)
            for name, loss in outcome.losses.items():
                self.engines[name].backward(loss * world, scale_wrt_gas=False)  # DeepSpeed averages over the ranks
            outcomes.append(outcome)
        stepping = {name: self.engines[name] for name in outcomes[0].losses}  # the others rest
        for name in stepping:
            if arrivals := self._arrivals.pop(name, None):
                arrivals.check(step)
        metrics = self._totals.over([outcome.metrics for outcome in outcomes], training=True)
        updated, first = self._finite.everywhere() and math.isfinite(metrics.get("loss", 0.0)), next(iter(self.engines))
        if not updated:
            for engine in stepping.values():
                skip_next_step(engine)
        for name, engine in stepping.items():
            engine.step()
            updated = updated and engine.was_step_applied()
            norm = float(engine.get_global_grad_norm() or 0.0)
            metrics["grad_norm" if name == first else f"grad_norm_{name}"] = norm
        if updated:
            metrics |= self.objective.after_step(step)
            self._average()
        else:
            self.objective.after_skipped_step()
        self._plain = None
        return StepResult.of(sums, metrics, updated)

    @torch.no_grad()
    def _average(self) -> None:
        for parameter, average in self._averages.items():
            average.lerp_(shard(parameter).float(), 1.0 - self.decay)

    @torch.no_grad()
    def evaluate(self, rows: list) -> dict[str, float]:
        batch = GlobalBatch(max(global_sums(self.objective, rows).weight, 1.0), 0, training=False)
        rows = self.prepared(rows)
        for engine in self.engines.values():
            engine.eval()
        outcomes = [self.objective.run(self.engines, to_device(row), batch) for row in rows]
        for engine in self.engines.values():
            engine.train()
        return self._totals.over([outcome.metrics for outcome in outcomes], training=False)

    @torch.no_grad()
    def forward(
        self, frozen: Sequence[torch.nn.Module], rows: Sequence[Any], read: Callable[..., dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        (model,) = frozen
        with self.on_device(model):
            here = map(to_device, rows)
            return [read(model, model(row), row) for row in here]

    def network(self) -> torch.nn.Module:
        return next(iter(self.plain_networks().values()))

    def plain_networks(self) -> Mapping[str, torch.nn.Module]:
        """Whole, unwrapped copies of the networks on every rank, averaged where averages are kept. Collective."""
        if self._plain is None:
            copies = self.spec.build(self.recipe, self.frozen)
            states = self.states(averaged=bool(self._averages))
            for name, network in copies.items():
                network.load_state_dict(states[name])
                network.eval().requires_grad_(False)
            self._plain = copies
        return self._plain

    def states(self, averaged: bool = False) -> dict[str, dict[str, torch.Tensor]]:
        """Whole tensors of every network, on every rank; parameters from their fp32 copies. Collective.

        Args:
            averaged: whether to take averaged parameters where they are kept.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        result = {}
        for name, network in self.networks.items():
            kept = network.state_dict().keys()  # non-persistent buffers are not in it
            state = {key: buffer.detach().clone() for key, buffer in network.named_buffers() if key in kept}
            for key, parameter in network.named_parameters():
                if averaged and parameter in self._averages:
                    state[key] = whole(parameter, self._averages[parameter])
                elif self.recipe.zero.stage and parameter.requires_grad:
                    state[key] = safe_get_full_fp32_param(parameter).detach().clone().view(full_shape(parameter))
                else:
                    state[key] = whole(parameter, shard(parameter))
            result[name] = state
        return result

    def close(self) -> None:
        for engine in self.engines.values():
            engine.destroy()
        self.engines.clear()
        forget_groups()


def to_device(row: Any) -> Any:
    """A row with its tensors on this rank's device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    device = platform.device()
    return replace(row, **{entry.name: moved(getattr(row, entry.name)) for entry in fields(row)})
