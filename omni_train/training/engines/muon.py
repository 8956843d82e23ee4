"""Muon for the matrices of a model, its state sharded over data ranks like that of AdamW beside it.

The update is momentum, orthogonalised by Newton–Schulz iterations: K. Jordan and others, "Muon: an optimizer for hidden
layers in neural networks" (2024). It is scaled to the size of AdamW's updates, so that both share a learning rate and a
weight decay: Moonlight (arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from omni_train import platform
from omni_train.nn.matrices import matrices
from omni_train.training.engines.whole_matrices import Exchange, Tile

MOMENTUM = 0.95
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates, at a learning rate of 1."""


_MARK = "is_managed_by_layer_wise_optimizer"
"""Megatron's name for parameters that AdamW's distributed optimizer does not own: they get buffers of their own."""


def mark_matrices(model: torch.nn.Module) -> None:
    """Mark the matrices of a model to be trained by Muon; must be called before the model is wrapped."""
    parameter: Any  # which torch's type lets have no attributes of others
    for parameter, rows in matrices(model).items():
        parameter.fused_rows = rows
        setattr(parameter, _MARK, True)


def orthogonalized(updates: Tensor, precision: str) -> Tensor:
    """Orthogonalised updates, about UVᵀ of each update USVᵀ, scaled to the root mean square of AdamW's updates.

    Args:
        updates: (N, rows, columns), N matrices.
        precision: precision of matrix products, as :func:`torch.set_float32_matmul_precision` takes it; "medium" is
            bf16.
    """
    from emerging_optimizers.orthogonalized_optimizers import get_muon_scale_factor
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
    from emerging_optimizers.utils import fp32_matmul_precision

    with fp32_matmul_precision(precision):
        result = newton_schulz(updates, steps=5)
    return result.mul_(ADAMW_RMS * get_muon_scale_factor(*updates.shape[-2:], mode="spectral"))


class Muon(torch.optim.Optimizer):
    """Muon: Nesterov momentum, orthogonalised updates, decoupled weight decay.

    Args:
        groups: parameter groups, of flat pieces of matrices.
        lr: learning rate.
        weight_decay: decoupled, as AdamW's.

    Attributes:
        orthogonalize: function that replaces every update in {parameter: update} in place.
    """

    orthogonalize: Callable[[dict[Tensor, Tensor]], None]

    def __init__(self, groups: list[dict], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody hands in a closure
        """Update every parameter; its gradient's memory then holds the update."""
        updates = {}
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            momentum = self.state[parameter]["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            updates[parameter] = parameter.grad.lerp_(momentum, MOMENTUM)
        self.orthogonalize(updates)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(updates[parameter], alpha=-group["lr"])


class DistributedMuon(DistributedOptimizer):
    """Megatron's distributed optimizer around :class:`Muon`: each data rank has a shard of master weights and momentum.

    Its state in a checkpoint is one whole tensor for each parameter, so that any layout can resume from it.

    Args:
        optimizer: Muon over this rank's shards.
        tensor_group: tensor ranks, which hold parts of the same matrices.
        group: the tensor ranks of all data ranks.
        precision: see :func:`orthogonalized`.
        wrapped: further arguments of the distributed optimizer.
    """

    def __init__(
        self, optimizer: Muon, *, tensor_group: ProcessGroup, group: ProcessGroup, precision: str, **wrapped: Any
    ) -> None:
        super().__init__(optimizer, grad_scaler=None, init_state_fn=lambda *_: None, **wrapped)
        place = (tensor_group.rank(), self.data_parallel_group.rank())
        places: list = [None] * group.size()
        torch.distributed.all_gather_object(places, place, group=group)
        tiles: list[Tile] = []
        self._held: list[Tensor | None] = []
        for buffer in self.buffers:
            for parameter, (start, _, bucket) in buffer.param_index_map.items():
                share = buffer.buckets[bucket].grad_data.numel() // self.data_parallel_group.size()
                tiles.append(_tile(parameter, start - buffer.buckets[bucket].offset, share))
                self._held.append(self._main_shard(parameter))
        self._exchange = Exchange(tiles, group, places)
        for shard in self._held:
            if shard is not None:
                optimizer.state[shard] = {"momentum_buffer": torch.zeros_like(shard)}
        optimizer.orthogonalize = partial(self._orthogonalize, partial(orthogonalized, precision=precision))

    def _main_shard(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """This rank's shard of the master weights of a parameter, None where it has none."""
        if parameter not in self.model_param_group_index_map:
            return None
        group, position = self.model_param_group_index_map[parameter]
        return self.optimizer.param_groups[group]["params"][position]

    def _orthogonalize(self, function: Callable[[Tensor], Tensor], updates: dict[Tensor, Tensor]) -> None:
        shards = {index: updates[shard] for index, shard in enumerate(self._held) if shard is not None}
        self._exchange.apply(shards, function)

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Names of a parameter's optimizer states in Megatron's checkpoints, beside its master weights."""
        return ("momentum_buffer",)

    def state_dict(self) -> dict:
        """Empty: the momentum is saved with the parameters, and the settings are the recipe's."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load momentum and master weights of a checkpoint, where it has them."""
        if "param_state" in state_dict:
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])

    def start_param_sync_for_bucket_group_subset(self) -> None:
        """Gather the parameters in the buffers of this optimizer only: AdamW gathers its own."""
        mine = {id(bucket) for buffer in self.buffers for bucket in buffer.buckets}
        for chunk in self.model_chunks:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                if id(group.buckets[0]) in mine:
                    chunk._start_bucket_group_param_sync(group, force_sync=False)


def _tile(parameter: Any, start: int, share: int) -> Tile:
    split = None
    if getattr(parameter, "tensor_model_parallel", False):
        split = 0 if parameter.partition_dim == parameter.dim() - 2 else 1
    return Tile(parameter.shape, parameter.fused_rows, split, start, share)


def _exchange_group(tensor_group: ProcessGroup, data_group: ProcessGroup) -> ProcessGroup:
    """Process group of the tensor ranks of all ranks of a data group. Collective over those ranks."""
    if tensor_group.size() == 1:
        return data_group
    data_groups: list = [None] * tensor_group.size()
    mine = torch.distributed.get_process_group_ranks(data_group)
    torch.distributed.all_gather_object(data_groups, mine, group=tensor_group)
    ranks = sorted(rank for one in data_groups for rank in one)
    return torch.distributed.new_group(ranks, use_local_synchronization=True)


def build_with_muon(
    options: OptimizerConfig, chunks: list[DistributedDataParallel], overrides: dict
) -> ChainedOptimizer:
    """Optimizer of wrapped model chunks: Muon for the marked matrices, AdamW for all else, sharded over data ranks.

    Args:
        options: Megatron's configuration of AdamW; learning rate, weight decay and precision are Muon's too.
        chunks: this rank's model chunks.
        overrides: Megatron's overrides of options by parameter group.
    """
    gloo = platform.has_cuda()
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(None, chunks, use_gloo_process_groups=gloo)
    every = _get_param_groups(chunks, options, overrides | {ParamKey(attr=_MARK): {"optimizer": "muon"}})
    dense_tensor_group = parallel_state.get_tensor_model_parallel_group()
    expert_tensor_group = parallel_state.get_expert_tensor_parallel_group()
    optimizers = []
    for expert in (False, True):
        tensor_group = expert_tensor_group if expert else dense_tensor_group
        data = "intra_expt_dp_group" if expert else "intra_dp_cp_group"
        model_group = groups["expt_tp_pp_with_egtp_remat_group" if expert else "mp_group"]
        for muon in (False, True):
            mine = [g for g in every if (g["is_expert_parallel"], g.get("optimizer") == "muon") == (expert, muon)]
            if not mine:
                continue
            buffers = {
                index: [
                    buffer
                    for buffer in (chunk.expert_parallel_buffers if expert else chunk.buffers)
                    if getattr(buffer.params[0], _MARK, False) is muon
                ]
                for index, chunk in enumerate(chunks)
            }
            wrapped = dict(
                config=options,
                model_chunks=chunks,
                per_model_buffers=buffers,
                data_parallel_group=groups[data],
                data_parallel_group_gloo=groups[f"{data}_gloo"] if gloo else None,
                data_parallel_group_idx=model_group.rank(),
                distributed_optimizer_instance_id=0,
            )
            if not muon:
                optimizer = _get_megatron_optimizer_based_on_param_groups(
                    param_groups=mine, model_parallel_group=model_group, **wrapped
                )
            else:
                optimizer = DistributedMuon(
                    Muon(mine, options.lr, options.weight_decay),
                    tensor_group=tensor_group,
                    group=_exchange_group(tensor_group, groups[data]),
                    precision="medium" if options.bf16 else "highest",
                    **wrapped,
                )
                optimizer.tp_group, optimizer.expert_tp_group = dense_tensor_group, expert_tensor_group
            optimizer.grad_stats_parallel_group = groups["intra_dist_opt_group"]
            optimizers.append(optimizer)
    return ChainedOptimizer(optimizers)
