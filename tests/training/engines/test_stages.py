"""What the last pipeline stage read of a frozen model reaches every stage, row by row."""

from __future__ import annotations

import torch

from omni_train.recipe.schema import ParallelConfig

ROWS = [{"states": torch.arange(6.0).view(2, 3), "log_prob": torch.tensor(-0.5)}, {"states": torch.full((4, 3), 7.0)}]


def share(rank, world_size, parallel):
    from megatron.core import parallel_state

    from omni_train import platform
    from omni_train.training.engines.stages import shared_by_stages

    platform.parallel.initialize(parallel, 1)
    found = ROWS if parallel_state.is_pipeline_last_stage() else []
    shared = shared_by_stages(found, len(ROWS))
    platform.parallel.destroy()
    return shared


def test_every_stage_has_what_the_last_one_found(distributed):
    for ranks, parallel in ((1, ParallelConfig()), (3, ParallelConfig(pipeline=3))):
        for shared in distributed(ranks, share, parallel):
            assert [row.keys() for row in shared] == [row.keys() for row in ROWS]
            for row, expected in zip(shared, ROWS, strict=True):
                assert all(torch.equal(row[key], expected[key]) for key in expected)
