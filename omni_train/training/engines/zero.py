"""The ZeRO engine: one optimizer step of a task over a global batch of rows, on data ranks alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from omni_train import platform
from omni_train.checkpoint.plain import AVERAGED, read_network
from omni_train.checkpoint.start import initialize_networks
from omni_train.checkpoint.zero import Layout, ZeroStore, fill
from omni_train.errors import UserError
from omni_train.objectives.task import Outcome
from omni_train.recipe.schema import Recipe
from omni_train.training.engines.deepspeed import forget_groups, import_deepspeed, spoil, wrap
from omni_train.training.engines.gradients import Arrivals, Finite
from omni_train.training.engines.megatron import StepResult
from omni_train.training.engines.optimizer import freeze, parameter_groups, set_learning_rate
from omni_train.training.tasks import build_evaluation, build_networks, build_task


class ZeroEngine:
    """A task's networks, each with its optimizer, on DeepSpeed's ZeRO. Process groups must exist.

    Args:
        recipe: what to train; every rank of the world is a data rank.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.task = build_task(recipe)
        named = list(named_parameters(self.task.networks))
        freeze(named, recipe.trainable)
        for name, network in self.task.networks.items():
            if not any(parameter.requires_grad for parameter in network.parameters()):
                raise UserError(f"trainable: matches nothing of {name}; add '{name}.*'")
        self._arrivals = {name: Arrivals(self._named(name)) for name in self.task.networks}
        self._finite = Finite(named)
        for network in self.task.networks.values():
            for tensor in (*network.parameters(), *network.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)
        self._parameters = sum(parameter.numel() for _, parameter in named)
        self.decay = recipe.optimizer.ema_decay
        self._averages: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._plain: dict[str, torch.nn.Module] | None = None
        self.engines: dict[str, Any] = {}

    def start(self) -> None:
        """Hand the networks, filled by now with what they start from, to DeepSpeed."""
        deepspeed, optimizer = import_deepspeed(), self.recipe.optimizer
        for name, network in self.task.networks.items():
            groups = parameter_groups(optimizer, self._named(name))
            self.engines[name] = wrap(deepspeed, self.recipe, network, groups)
        if self.decay:
            self._averages = {parameter: shard(parameter).float().clone() for parameter in self._averaged()}

    def _named(self, name: str) -> Iterator:
        return named_parameters({name: self.task.networks[name]}, alone=len(self.task.networks) == 1)

    def _averaged(self) -> Iterator[torch.nn.Parameter]:
        for network in self.task.networks.values():
            yield from (parameter for parameter in network.parameters() if parameter.requires_grad)

    def open_store(self, directory: Path) -> ZeroStore:
        """The run's checkpoints."""
        return ZeroStore(directory, self.recipe.checkpoint, self.recipe.model)

    def initialize(self, store: ZeroStore) -> None:
        """Start as the recipe's `init_from` and `init_parts` say, or fresh."""
        if self.recipe.init_from or self.recipe.init_parts:
            initialize_networks(self.task.networks, self.recipe)
        self.start()

    def resume(self, store: ZeroStore, checkpoint: Path) -> dict:
        """Go on from a checkpoint of this run; what the trainer had to remember."""
        store.check(checkpoint, self._layout())
        for name, network in self.task.networks.items():
            fill(network, checkpoint, name)
        self.start()
        progress = store.load(checkpoint, self.engines)
        self.restore_averages(checkpoint)
        self._keep_settings()
        return progress

    def _keep_settings(self) -> None:
        """Take the recipe's settings again, in whose place DeepSpeed has put those of the checkpoint."""
        config = self.recipe.optimizer
        for engine in self.engines.values():
            engine.optimizer.clip_grad = config.clip_grad
            for group in engine.optimizer.param_groups:
                group["betas"], group["eps"] = tuple(config.betas), config.eps

    def save(self, store: ZeroStore, step: int, progress: dict, loader_state) -> None:
        """Write a checkpoint. Collective."""
        states = self.states()
        if self.decay:
            states |= {name + AVERAGED: state for name, state in self.states(averaged=True).items()}
        store.save(step, states, self.engines, self._layout(), progress, loader_state)

    def _layout(self) -> Layout:
        return Layout(torch.distributed.get_world_size(), self.recipe.zero.stage)

    def flops(self, rows: list) -> float:
        """Of a step over these rows: forward and backward are six operations per parameter and token, roughly."""
        return 6.0 * self._parameters * sum(map(self.task.tokens, rows))

    def restore_averages(self, checkpoint: Path) -> None:
        """Read the averaged weights of a checkpoint, where this run keeps some."""
        if not self.decay:
            return
        for name, network in self.task.networks.items():
            tensors = read_network(checkpoint, name)
            for key, parameter in network.named_parameters():
                if parameter in self._averages:
                    self._averages[parameter].copy_(_share_of(parameter, tensors[key]))

    def train_step(self, rows: list, learning_rate: float, step: int = 0) -> StepResult:
        """One optimizer step of every network.

        Args:
            rows: this rank's rows of the global batch, as many on every rank.
            learning_rate: of this step.
            step: number of steps done, which with the recipe's seed decides what is drawn at random.
        """
        world = torch.distributed.get_world_size()
        counts = [
            sum(map(self.task.weight, rows)),
            sum(map(self.task.tokens, rows)),
            float(sum(row.samples for row in rows)),
            float(sum(sum(row.skipped.values()) for row in rows)),
        ]
        weight, tokens, samples, skipped = _summed(torch.tensor(counts, dtype=torch.float64)).tolist()
        for engine in self.engines.values():
            engine.train()
            set_learning_rate(engine.optimizer.param_groups, learning_rate, self.recipe.optimizer.weight_decay)
        self._finite.begin_step()
        outcomes = []
        for row in rows:
            outcome = self.task.run(self.engines, to_device(row), max(weight, 1.0), step, training=True)
            for name, loss in outcome.losses.items():
                self.engines[name].backward(loss * world, scale_wrt_gas=False)  # it averages over the ranks
            outcomes.append(outcome)
        stepping = {name: self.engines[name] for name in outcomes[0].losses}  # the others rest
        for name in stepping:
            if arrivals := self._arrivals.pop(name, None):
                arrivals.check(step)
        metrics = _figures(outcomes)
        updated, first = self._finite.everywhere() and math.isfinite(metrics.get("loss", 0.0)), next(iter(self.engines))
        if not updated:
            for engine in stepping.values():
                spoil(engine)
        for name, engine in stepping.items():
            engine.step()
            updated = updated and engine.was_step_applied()
            norm = float(engine.get_global_grad_norm() or 0.0)
            metrics["grad_norm" if name == first else f"grad_norm_{name}"] = norm
        if updated:
            metrics |= self.task.after_step(self.task.networks, step)
            self._average()
        else:
            self.task.after_skipped_step(self.task.networks)
        self._plain = None
        return StepResult(metrics, tokens, int(samples), int(skipped), updated)

    @torch.no_grad()
    def _average(self) -> None:
        for parameter, average in self._averages.items():
            average.lerp_(shard(parameter).float(), 1.0 - self.decay)

    @torch.no_grad()
    def evaluate(self, rows: list) -> dict[str, float]:
        """Figures of held-out rows over all ranks."""
        weight = float(_summed(torch.tensor(float(sum(map(self.task.weight, rows))), dtype=torch.float64)))
        for engine in self.engines.values():
            engine.eval()
        outcomes = [self.task.run(self.engines, to_device(row), max(weight, 1.0), 0, training=False) for row in rows]
        for engine in self.engines.values():
            engine.train()
        return _figures(outcomes)

    def evaluation(self, feed):
        """What answers held-out questions: a call returns figures and this rank's predictions that are to be shown."""
        run = build_evaluation(self.recipe, feed, self.task.teacher)
        return lambda: run(self.plain_networks())

    def plain_networks(self) -> dict[str, torch.nn.Module]:
        """Whole copies of the networks on every rank, outside DeepSpeed, with averaged weights where there are any."""
        if self._plain is None:
            copies = build_networks(self.recipe, self.task.teacher)
            states = self.states(averaged=bool(self._averages))
            for name, network in copies.items():
                network.load_state_dict(states[name])
                network.eval().requires_grad_(False)
            self._plain = copies
        return self._plain

    def states(self, averaged: bool = False) -> dict[str, dict[str, torch.Tensor]]:
        """Every tensor of every network, whole, on every rank; parameters from their fp32 copies. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        result = {}
        for name, network in self.task.networks.items():
            kept = network.state_dict().keys()  # not every buffer is
            state = {key: buffer.detach().clone() for key, buffer in network.named_buffers() if key in kept}
            for key, parameter in network.named_parameters():
                if averaged and parameter in self._averages:
                    state[key] = _whole(parameter, self._averages[parameter])
                elif self.recipe.zero.stage and parameter.requires_grad:
                    state[key] = safe_get_full_fp32_param(parameter).detach().clone().view(full_shape(parameter))
                else:
                    state[key] = _whole(parameter, shard(parameter))
            result[name] = state
        return result

    def close(self) -> None:
        """Let go of DeepSpeed's engines."""
        for engine in self.engines.values():
            engine.destroy()
        self.engines.clear()
        forget_groups()


def named_parameters(networks: dict[str, torch.nn.Module], alone: bool | None = None) -> Iterator:
    """(name, parameter) as recipes match them: a lone network's own names, else behind the network's name and a dot."""
    alone = len(networks) == 1 if alone is None else alone
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            yield (key if alone else f"{name}.{key}"), parameter


def shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter between steps: a part of it at ZeRO's stage 3, else all."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part.data


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _share_of(parameter: torch.nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, as :func:`shard` has it."""
    mine = shard(parameter)
    if mine is parameter.data or mine.shape == whole.shape:
        return whole
    start = torch.distributed.get_rank() * mine.numel()
    part = whole.flatten()[start : start + mine.numel()]
    return torch.nn.functional.pad(part, (0, mine.numel() - part.numel()))


def _whole(parameter: torch.nn.Parameter, mine: torch.Tensor) -> torch.Tensor:
    """A parameter, or its average, from what each rank has of it as :func:`shard` says. Collective at stage 3."""
    if not hasattr(parameter, "ds_tensor"):
        return mine.detach().clone()
    parts = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, mine.detach())
    shape = full_shape(parameter)
    return torch.cat(parts)[: shape.numel()].view(shape)


def to_device(row: Any) -> Any:
    """A row with its tensors on this rank's device."""
    values = {entry.name: getattr(row, entry.name) for entry in fields(row)}
    device = platform.device()
    tensors = {
        name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, torch.Tensor)
    }
    return replace(row, **tensors)


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.to(platform.device())
    torch.distributed.all_reduce(tensor)
    return tensor.cpu()


def _figures(outcomes: list[Outcome]) -> dict[str, float]:
    """The figures of all rows of all ranks: sums over weights; none of what nothing was said of."""
    names = list(outcomes[0].figures)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    for outcome in outcomes:
        if list(outcome.figures) != names:
            raise RuntimeError(f"rows of one batch have other figures: {names} and {list(outcome.figures)}")
        sums += torch.tensor([[float(part) for part in pair] for pair in outcome.figures.values()], dtype=torch.float64)
    sums = _summed(sums)
    return {name: total / weight for name, (total, weight) in zip(names, sums.tolist(), strict=True) if weight}
