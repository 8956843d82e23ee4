"""Metrics of rows become those of the global batch, whoever has the rows."""

from __future__ import annotations

import pytest
import torch

from omni_train.recipe.schema import ParallelConfig
from tests.support.pool import RankFailed

ROWS = [
    {"loss": (torch.tensor(0.25), None), "right": (torch.tensor(3.0), 4.0), "none": (0.0, 0.0)},
    {"loss": (torch.tensor(0.5), None), "right": (torch.tensor(1.0), torch.tensor(12.0)), "none": (0.0, 0.0)},
]


def totals_of(rank, world_size, parallel, rows):
    """Of two rows on each data rank, in training and in evaluation, which names another metric."""
    from megatron.core import parallel_state

    from omni_train import platform
    from omni_train.training.engines.metrics import Totals

    platform.parallel.initialize(parallel, 1)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    totals = Totals(torch.float32, ranks, pipeline)
    mine = rows if pipeline.rank() == pipeline.size() - 1 else []
    found = [totals.over(mine, training=True) for _ in range(2)]
    found.append(totals.over([{"seen": (2.0, 8.0)}] if mine else [], training=False))
    platform.parallel.destroy()
    return found


@pytest.mark.parametrize(("ranks", "parallel", "data"), [(1, {}, 1), (2, {"pipeline": 2}, 1), (4, {"pipeline": 2}, 2)])
def test_every_rank_has_the_same_and_names_are_learned(distributed, ranks, parallel, data):
    for once, again, held_out in distributed(ranks, totals_of, ParallelConfig(**parallel), ROWS):
        assert once == again == {"loss": 0.75 * data, "right": 4.0 / 16.0}
        assert held_out == {"seen": 0.25}


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ({"right": (1.0, 1.0)}, "loss must be among them"),
        ({"loss": (1.0, None), "step": (1.0, 1.0)}, "has a metric step, which the run logs itself"),
    ],
)
def test_metrics_without_a_loss_or_with_the_runs_own_are_refused(distributed, metrics, why):
    with pytest.raises(RankFailed, match=why):
        distributed(1, totals_of, ParallelConfig(), [metrics])


def test_rows_of_a_batch_that_name_other_metrics_are_refused(distributed):
    with pytest.raises(RankFailed, match="rows name different metrics"):
        distributed(1, totals_of, ParallelConfig(), [ROWS[0], {"loss": ROWS[1]["loss"]}])
