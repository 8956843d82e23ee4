"""Process groups and random seeds of a parallel layout."""

from __future__ import annotations

import random

import numpy as np
import torch

from omni_train.platform.device import has_cuda
from omni_train.recipe.schema import ParallelConfig

_model_group: torch.distributed.ProcessGroup | None = None


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Create Megatron's process groups for the layout and seed every generator.

    Ranks that hold the same parameters draw the same initial values; tensor, expert and pipeline ranks different ones.

    Args:
        parallel: a validated layout.
        seed: of the run.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=has_cuda(),
    )
    seed = seed + 100_000 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _create_model_group()


def destroy() -> None:
    """Destroy the layout's process groups, so that another layout can be initialised in this process."""
    global _model_group
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    _model_group = None


def _create_model_group() -> None:
    global _model_group
    slices: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(slices, data_rank())
    for index in range(max(slices) + 1):
        members = [rank for rank, slice_index in enumerate(slices) if slice_index == index]
        group = torch.distributed.new_group(members)
        if index == data_rank():
            _model_group = group


def data_rank() -> int:
    """Data-parallel rank: the slice of the data that this rank reads, as do all ranks of its model group."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def data_world_size() -> int:
    """Data-parallel size: the number of slices that the data is read in."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def model_group() -> torch.distributed.ProcessGroup:
    """Ranks that work on the same row: tensor, pipeline and context parallel together.

    Raises:
        RuntimeError: :func:`initialize` has not been called.
    """
    if _model_group is None:
        raise RuntimeError("initialize() must come first: there is no parallel layout yet")
    return _model_group


def first_stage_group() -> torch.distributed.ProcessGroup | None:
    """Tensor and context-parallel ranks of this rank's first pipeline stage; None on the other stages."""
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_rank() > 0:
        return None
    return parallel_state.get_tensor_and_context_parallel_group()


def gather_over_data_ranks(value) -> list:
    """Values of all data-parallel ranks, in their order. Collective."""
    from megatron.core import parallel_state

    values: list = [None] * data_world_size()
    torch.distributed.all_gather_object(values, value, group=parallel_state.get_data_parallel_group())
    return values
