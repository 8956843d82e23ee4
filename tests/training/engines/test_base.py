"""What an engine knows of a global batch before it steps."""

from __future__ import annotations

import torch

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.recipe.schema import ParallelConfig, QualityConfig, StratumConfig

STRATA = [StratumConfig("clean", QualityConfig(dnsmos=[3.0, None])), StratumConfig("loud", weight=0.0)]


def row_of(weight: float) -> PackedBatch:
    """A token of text that weighs so much in the loss."""
    return PackedBatch(
        tokens=torch.zeros(1, dtype=torch.long),
        labels=torch.full((1,), IGNORE),
        loss_weights=torch.tensor([weight]),
        position_ids=torch.zeros(3, 1, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        padding=torch.zeros(1, dtype=torch.bool),
        samples=1,
        skipped={"broken_json": 2},
        strata={"clean": 3},
        left_out={"stratum_loud": 1, "passed_over": 7},
    )


def sums_of(rank, world_size):
    from omni_train import platform
    from omni_train.objectives.language_modelling import LanguageModelling
    from omni_train.training.engines.base import global_sums

    platform.parallel.initialize(ParallelConfig(), 1)
    sums = global_sums(LanguageModelling(8, 0.0, by_modality=True), [row_of(2.0**24), row_of(1.0)], strata=STRATA)
    platform.parallel.destroy()
    return sums


def test_a_batch_is_counted_where_fp32_counts_no_further(distributed):
    for sums in distributed(2, sums_of):
        assert sums.weight == 2.0 * (2**24 + 1)
        assert sums.tokens == sums.tokens_by_modality["text"] == sums.samples == 4
        assert sum(sums.tokens_by_modality.values()) == 4
        assert sums.skipped == 8
        assert sums.strata == {"clean": 12, "loud": 0}
        assert sums.left_out == {"stratum_loud": 4, "no_stratum": 0, "passed_over": 28}
