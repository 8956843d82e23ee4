"""Routed experts with their weights stacked, so that all of them run as one grouped product.

One implementation for CPU and GPU: checkpoints then hold the same tensors everywhere, and
`torch.nn.functional.grouped_mm` has kernels for both. Transformer Engine's grouped MLP would name and split the same
weights differently.

Axis letters: R tokens routed to this rank's experts, sorted by expert; E experts of this rank, H hidden, F the experts'
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import utils
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def weighted_swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """SwiGLU activation times routing probability, silu(gate) · up · prob. Saves only its inputs for backward.

    Args:
        gate_up: (R, 2·F) gate projections before up projections.
        probs: (R,) routing probabilities.

    Returns:
        (R, F).
    """
    if gate_up.is_cuda:
        return weighted_bias_swiglu_impl(gate_up, None, probs[:, None])  # compiled into one kernel
    return _WeightedSwiGLU.apply(gate_up, probs)


class _WeightedSwiGLU(torch.autograd.Function):
    """Works in place where it can: on the CPU the products are so small that every pass over memory counts."""

    @staticmethod
    def forward(ctx, gate_up, probs):
        ctx.save_for_backward(gate_up, probs)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(probs[:, None])

    @staticmethod
    def backward(ctx, grad):
        gate_up, probs = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_probs = (grad_up * up).sum(1, dtype=probs.dtype)
        grad_up.mul_(probs[:, None])
        grad_silu = (grad * up).mul_(probs[:, None])
        torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_gate)
        return grad_gate_up, grad_probs


class StackedLinear(torch.nn.Module):
    """Linear layer of all local experts, with weights stacked as (E, out, in).

    Args:
        shape: (E, out, in) that this rank holds.
        split_dim: dimension that expert tensor parallelism splits.
        init_method: draws the initial weights in place.
        config: Megatron's configuration.
    """

    def __init__(self, shape: tuple[int, int, int], split_dim: int, init_method, config: TransformerConfig) -> None:
        super().__init__()
        weight = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=split_dim, stride=1)
        # Reduced over the expert data-parallel group and kept by the experts' optimizer, in every layout: the attribute
        # must not follow the expert-parallel size, or the sum over ranks would be wrong where expert and dense tensor
        # parallelism differ, and optimizer states would move between optimizers when the layout changes.
        self.weight.allreduce = False
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init_method(self.weight)

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Grouped matrix product.

        Args:
            tokens: (R, in) sorted by expert.
            ends: (E,) int32, end of each expert's tokens.

        Returns:
            (R, out).
        """
        return F.grouped_mm(tokens, self.weight.transpose(1, 2), offs=ends)


class GroupedExperts(MegatronModule):
    """SwiGLU experts for :class:`megatron.core.transformer.moe.moe_layer.MoELayer`.

    `linear_fc1.weight` is (E, 2·F / tp, H), this rank's gate rows over its up rows; `linear_fc2.weight` is
    (E, H, F / tp), tp being expert tensor parallelism. In a checkpoint they are (experts, 2·F, H) and (experts, H, F)
    over all experts, so every layout loads what any other saved. The router's probability multiplies the activation,
    before the second product, as in Megatron's own experts.

    Raises:
        ValueError: experts that are not SwiGLU without biases, or widths that are not multiples of 16 bytes.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.activation_func is not F.silu or not config.gated_linear_unit or config.add_bias_linear:
            raise ValueError("GroupedExperts: experts must be SwiGLU without biases")
        self.groups = pg_collection
        width, hidden = utils.divide(config.moe_ffn_hidden_size, pg_collection.expt_tp.size()), config.hidden_size
        alignment = 16 // config.params_dtype.itemsize  # the grouped product takes only rows of whole 16 bytes
        if width % alignment or hidden % alignment:
            raise ValueError(
                f"hidden size {hidden} and the experts' width per rank {width} must be multiples of {alignment}"
            )
        self.linear_fc1 = StackedLinear((num_local_experts, 2 * width, hidden), 1, config.init_method, config)
        self.linear_fc2 = StackedLinear((num_local_experts, hidden, width), 2, config.output_layer_init_method, config)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Outputs of the experts, times their routing probabilities.

        Args:
            tokens: (R, H) sorted by expert.
            tokens_per_expert: (E,) on the same device.
            probs: (R,) routing probabilities.

        Returns:
            (R, H), and None for the bias.
        """
        ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
        hidden = self.linear_fc1(tokens, ends)
        hidden = weighted_swiglu(hidden, probs)
        output = self.linear_fc2(hidden, ends)
        if output.requires_grad:
            output.register_hook(Tensor.contiguous)  # the grouped product's backward requires it
        return output, None

    def backward_dw(self) -> None:
        """Do nothing, as Megatron calls it: weight gradients were computed in the backward pass."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Sharded state dict over all experts; gate and up are two shards, as tensor parallelism splits each."""
        groups = self.groups
        experts = (len(sharded_offsets), groups.ep.rank(), groups.ep.size())
        tp_rank, tp_size = groups.expt_tp.rank(), groups.expt_tp.size()

        def sharded(key: str, tensor: Tensor, replica_id, axis: int, position: int, pieces: int) -> ShardedTensor:
            offsets = (*sharded_offsets, experts, (axis + len(sharded_offsets), position, pieces))
            return ShardedTensor.from_rank_offsets(
                key, tensor, *offsets, replica_id=replica_id, prepend_axis_num=len(sharded_offsets)
            )

        def split(key, tensor, replica_id, flattened_range):
            return [
                sharded(key, half, replica_id, 1, tp_rank + position * tp_size, 2 * tp_size)
                for position, half in enumerate(tensor.chunk(2, dim=1))
            ]

        replica_id = (0, 0, groups.expt_dp.rank())
        fc1, fc2 = f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"
        return {
            fc1: ShardedTensorFactory(
                fc1, self.linear_fc1.weight, split, lambda halves: torch.cat(halves, dim=1), replica_id
            ),
            fc2: sharded(fc2, self.linear_fc2.weight, replica_id, 2, tp_rank, tp_size),
        }
