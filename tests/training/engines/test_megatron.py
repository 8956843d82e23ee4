"""What the Megatron engine knows of a global batch before it steps."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from omni_train.data.rows.batch import MODALITIES
from omni_train.recipe.schema import ParallelConfig


def sums_of(rank, world_size):
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine

    platform.parallel.initialize(ParallelConfig(), 1)
    rows = [
        SimpleNamespace(
            modality=torch.zeros(1, dtype=torch.uint8),
            padding=torch.zeros(1, dtype=torch.bool),
            loss_weights=torch.tensor([weight]),
            samples=1,
            skipped={"broken_json": 2},
        )
        for weight in (2.0**24, 1.0)
    ]
    sums = MegatronEngine._global_sums(None, rows)
    platform.parallel.destroy()
    return sums


def test_a_batch_is_counted_where_fp32_counts_no_further(distributed):
    for sums in distributed(2, sums_of):
        assert sums.weights == [2.0 * (2**24 + 1)] + [0.0] * (len(MODALITIES) - 1)
        assert sums.tokens[0] == sums.samples == 4
        assert sums.skipped == 8
