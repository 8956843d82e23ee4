"""On its first step a run sees whether a gradient comes to everything that it trains."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from omni_train.data.rows.batch import WaveRow
from omni_train.objectives.base import NetworksObjective, Outcome
from omni_train.recipe.schema import EngineName, ParallelConfig, Recompute, ZeroConfig
from tests.support.networks import lone_engine_network
from tests.support.pool import RankFailed
from tests.support.thinker import encoders, random_row, small_recipe


def first_steps(rank, world_size, parallel, changes):
    """Two steps of an engine that knows nothing of the first, over rows of a few words and no media."""
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_recipe(parallel, **changes)
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    rows = [random_row([2], 96, seed=rank)]
    updated = [engine.train_step(rows, 1e-3, step).updated for step in range(2)]
    loads = engine.expert_loads()
    platform.parallel.destroy()
    return updated, min(min(load) for load in loads.values())


@pytest.mark.parametrize("parallel", [ParallelConfig(expert=2), ParallelConfig(pipeline=2)], ids=["EP2", "PP2"])
def test_zeros_are_a_gradient(distributed, parallel):
    """Experts that no token chooses, encoders whose media no row has."""
    for updated, least_load in distributed(2, first_steps, parallel, encoders() | {"mtp_num_hidden_layers": 1}):
        assert updated == [True, True]
        assert least_load == 0.0


def with_reentrant_checkpoint(rank, world_size, parallel, changes):
    """As Megatron recomputes."""
    from megatron.core import tensor_parallel

    from omni_train.nn.backend import backend

    backend()
    with patch.object(tensor_parallel, "checkpoint", tensor_parallel.random.checkpoint):
        first_steps(rank, world_size, parallel, changes)


def test_parameters_without_a_gradient_stop_the_run_by_their_names(distributed):
    """On the first of two stages no activation needs one; the second's come from it, and do."""
    changes = {"trainable": ["*experts.linear*", "*router*"], "recompute": Recompute.full}
    lost = (
        r"step 1: no gradient comes to 10 of the parameters that are trained: decoder.layers.1.mlp.experts.linear_fc1."
        r"weight, decoder.layers.1.mlp.experts.linear_fc2.weight, decoder.layers.1.mlp.router.weight and 7 more; "
        r"the loss does not depend on them: leave them out of trainable"
    )
    with pytest.raises(RankFailed, match=lost):
        distributed(2, with_reentrant_checkpoint, ParallelConfig(pipeline=2), changes)


def pair(idle: str) -> str:
    """The name of two networks, the one of that name with a part that no loss depends on."""

    def build(recipe):
        networks = {
            name: torch.nn.ModuleDict({key: torch.nn.Linear(4, 4) for key in ("used", *(["idle"] if own else []))})
            for name, own in (("first", idle == "first"), ("second", idle == "second"))
        }
        for network in networks.values():
            network.forward = network["used"].forward
        return networks

    return lone_engine_network("pair", lambda networks: Pair(), build)


class Pair(NetworksObjective):
    """The second network has a loss from the second step on."""

    def weight(self, row: WaveRow) -> float:
        return 1.0

    def tokens(self, row: WaveRow) -> float:
        return 1.0

    def run(self, networks, row, batch) -> Outcome:
        names = ("first", "second") if batch.step else ("first",)
        losses = {name: networks[name](row.waveform).square().sum() / batch.weight for name in names}
        return Outcome(losses, {"loss": (losses["first"].detach(), 1.0)})


def steps_of_a_pair(rank, world_size, stage, idle):
    """Steps that were taken before there was an error, and the error."""
    from omni_train import platform
    from omni_train.errors import UserError
    from omni_train.training.engines import zero as zero_engine

    zero = ZeroConfig(stage=stage, whole_below=10)
    recipe = small_recipe(engine=EngineName.deepspeed, zero=zero, network=pair(idle))
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    engine = zero_engine.ZeroEngine(recipe)
    engine.start()
    taken, message = 0, ""
    try:
        for step in range(3):
            rows = [WaveRow(torch.ones(2, 4), torch.ones(2), torch.ones(2), samples=2)]
            taken += engine.train_step(rows, 0.1, step).updated
    except UserError as error:
        message = str(error)
    engine.close()
    platform.parallel.destroy()
    return taken, message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_zero_engine_asks_each_network_when_it_first_has_a_loss(distributed, stage):
    for idle, steps in (("none", 3), ("first", 0), ("second", 1)):
        for taken, found in distributed(2, steps_of_a_pair, stage, idle):
            assert taken == steps
            lost = f"step {steps + 1}: no gradient comes to 2 of the parameters that are trained: {idle}.idle.bias, "
            assert found.startswith(lost) if steps < 3 else not found


def train_one_of_a_pair(rank, world_size):
    from omni_train.training.engines import zero as zero_engine

    zero_engine.ZeroEngine(small_recipe(engine=EngineName.deepspeed, trainable=["first.*"], network=pair("none")))


def test_a_network_of_which_nothing_trains_is_refused_by_name(distributed):
    with pytest.raises(RankFailed, match=r"trainable: matches nothing of second; add 'second\.\*'"):
        distributed(1, train_one_of_a_pair)
