"""Tensors of the last pipeline stage, sent to the other stages."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from omni_train import platform


def shared_by_stages(found: list[dict[str, torch.Tensor]], rows: int) -> list[dict[str, torch.Tensor]]:
    """Tensors of each row, on all pipeline stages. Collective.

    Args:
        found: tensors of each row by name, on the last stage; ignored elsewhere.
        rows: number of rows.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return found
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    here = torch.distributed.get_rank() == source
    told: list = [[{key: (value.shape, value.dtype) for key, value in row.items()} for row in found] if here else None]
    torch.distributed.broadcast_object_list(told, src=source, group=group)
    shared: list[dict[str, torch.Tensor]] = []
    for index in range(rows):
        row = {}
        for key, (shape, dtype) in told[0][index].items():
            tensor = (
                found[index][key].contiguous() if here else torch.empty(shape, dtype=dtype, device=platform.device())
            )
            torch.distributed.broadcast(tensor, src=source, group=group)
            row[key] = tensor
        shared.append(row)
    return shared
