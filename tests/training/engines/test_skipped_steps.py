"""A step that is skipped leaves everything as it was, bit for bit, on both engines, whichever rank made it useless."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from omni_train.models.codec import SpeechCodec
from omni_train.models.discriminators import Discriminators
from omni_train.objectives.codec import CodecTraining
from omni_train.recipe.schema import EngineName, ParallelConfig, ZeroConfig
from tests.support.codec import CODE2WAV, CODEC, TRAINING, wave_row
from tests.support.networks import lone_engine_network
from tests.support.thinker import encoders, media_batches, small_recipe


def everything(tensors_of_model, optimizers) -> list[torch.Tensor]:
    """Copies of all tensors that outlive a step on this rank: those given, the optimizers' and the generator's."""

    def tensors() -> Iterator[torch.Tensor]:
        yield from tensors_of_model
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]
            for state in optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        yield torch.get_rng_state()

    return [tensor.detach().clone() for tensor in tensors()]


def alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether nothing has changed. What pads a shard of ZeRO's was never written, and may be no number."""
    same = (
        mine.shape == its.shape and (mine == its) | (mine.isnan() & its.isnan())
        for mine, its in zip(one, other, strict=False)
    )
    return len(one) == len(other) and all(bool(torch.as_tensor(each).all()) for each in same)


def not_a_number(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * torch.nan


def skip_in_megatron(rank, world_size, parallel):
    """Two steps; one with sound that is no number on a data rank; one with such a gradient on the last rank; a last."""
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_recipe(parallel, **encoders())
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    world, mine = platform.parallel.data_world_size(), platform.parallel.data_rank()
    share = 2 // world
    batches = [rows[mine * share : (mine + 1) * share] for rows in media_batches(5)]

    def state() -> list[torch.Tensor]:
        parts = [part.optimizer for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])]
        # Of buffers those that a checkpoint has: the others begin anew with each step.
        kept = (value for chunk in engine.chunks for value in chunk.state_dict().values())
        return everything((value for value in kept if isinstance(value, torch.Tensor)), parts)

    for step in range(2):
        assert engine.train_step(batches[step], 1e-3, step).updated
    before = state()
    if mine == 0:
        batches[2][0].mel[3] = torch.inf
    by_loss = engine.train_step(batches[2], 1e-3, 2)
    assert alike(before, state())
    if rank == world_size - 1:
        parameter = engine.chunks[0].module.decoder.layers[1].mlp.router.weight
        handle = parameter.register_hook(not_a_number)
    by_gradient = engine.train_step(batches[3], 1e-3, 3)
    assert alike(before, state())
    if rank == world_size - 1:
        handle.remove()
    last = engine.train_step(batches[4], 1e-3, 4)
    assert not alike(before, state())
    platform.parallel.destroy()
    return [by_loss.updated, by_gradient.updated, last.updated], by_gradient.metrics["loss"]


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(pipeline=2)], ids=["DP2", "PP2"])
def test_the_megatron_engine_skips_the_whole_step(distributed, parallel):
    for updated, loss in distributed(2, skip_in_megatron, parallel):
        assert updated == [False, False, True]
        assert loss == loss  # it was the gradient alone


def skip_in_zero(rank, world_size, zero):
    """A codec's steps: the first useless, the next two fine; then sound that is no number, and a gradient."""
    from omni_train import platform
    from omni_train.training.engines import zero as zero_engine
    from omni_train.training.engines.zero import shard

    network = lone_engine_network("codec of a test", lambda _: objective, lambda _: objective.networks)
    recipe = small_recipe(engine=EngineName.deepspeed, zero=zero, network=network)
    recipe.optimizer.ema_decay = 0.9
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    torch.manual_seed(3)
    codec, judges = SpeechCodec(CODEC, CODE2WAV), Discriminators(TRAINING.discriminators)
    objective = CodecTraining(codec, judges, TRAINING, seed=5)
    engine = zero_engine.ZeroEngine(recipe)
    engine.start()

    def state() -> list[torch.Tensor]:
        optimizers = [getattr(one.optimizer, "optimizer", one.optimizer) for one in engine.engines.values()]
        parameters = (shard(parameter) for network in (codec, judges) for parameter in network.parameters())
        return everything((*parameters, *codec.buffers(), *engine._averages.values()), optimizers)

    def step(number: int, spoilt: bool = False) -> bool:
        rows = [wave_row(seed=10 * number + 2 * rank + of_rank) for of_rank in range(2)]
        if spoilt and rank == world_size - 1:
            rows[1].waveform[1, 7] = torch.nan
        return engine.train_step(rows, 1e-3, number).updated

    def is_skipped(number: int, spoilt: bool = True) -> bool:
        before = state()
        updated = step(number, spoilt)
        return not updated and alike(before, state())

    def parts() -> list:
        return [part.codebooks for part in (codec.quantizer.semantic, codec.quantizer.acoustic)]

    out = [is_skipped(0), not any(part.ready for part in parts()), step(1), step(2), is_skipped(3)]
    out.append(all(not part._samples and part._counts is None for part in parts()))
    for network in (codec, judges):  # the gradient of one network alone
        if rank == world_size - 1:
            handle = [*network.parameters()][-1].register_hook(not_a_number)
        out.append(is_skipped(4, spoilt=False))
        if rank == world_size - 1:
            handle.remove()
    before = state()
    out += [step(5), not alike(before, state())]
    engine.close()
    platform.parallel.destroy()
    return out


@pytest.mark.parametrize(
    ("ranks", "zero"),
    [
        (1, ZeroConfig(stage=0)),
        (2, ZeroConfig(stage=0)),
        (2, ZeroConfig(stage=1)),
        (2, ZeroConfig(stage=2)),
        (2, ZeroConfig(stage=2, offload_optimizer=True)),
        (2, ZeroConfig(stage=3, whole_below=10)),
        (2, ZeroConfig(stage=3, whole_below=10, offload_optimizer=True)),
    ],
    ids=str,
)
def test_the_zero_engine_skips_the_whole_step_of_every_network(distributed, ranks, zero):
    for out in distributed(ranks, skip_in_zero, zero):
        assert all(out), out
