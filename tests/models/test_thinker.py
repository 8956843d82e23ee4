"""A packed row is its samples, each alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from omni_train.data.rows.batch import IGNORE
from omni_train.recipe.schema import ParallelConfig
from tests.support.thinker import add_media, encoders, random_row, small_recipe

LENGTHS = [37, 11, 29]


def pieces(row):
    """Each sample of a row as a row of its own."""
    boundaries = row.cu_seqlens.tolist()
    for index, length in enumerate(LENGTHS):
        alone = random_row([length], 96, seed=0)
        start = boundaries[index]
        for name in ("tokens", "labels", "loss_weights"):
            getattr(alone, name)[:length] = getattr(row, name)[start : start + length]
        alone.labels[length:], alone.loss_weights[length:] = IGNORE, 0.0
        yield alone, slice(start, start + length), slice(0, length)


def packed_and_alone(rank, world_size, changes):
    """Largest differences of logits, loss and, relative to the largest, gradients."""
    from omni_train import platform
    from omni_train.models.row import LocalRow
    from omni_train.models.thinker import build_chunks
    from omni_train.nn import balance
    from omni_train.objectives.base import GlobalBatch
    from omni_train.objectives.language_modelling import LanguageModelling

    recipe = small_recipe(router_aux_loss_coef=0.05, **changes)
    platform.parallel.initialize(recipe.parallel, 19)
    model = build_chunks(recipe)[0]
    row = random_row(LENGTHS, 96, seed=4)
    objective = partial(LanguageModelling(40, 0.3, by_modality=False), batch=GlobalBatch(row.num_loss_tokens, 0, True))

    def run(batch):
        balance.begin_step([model], float((~row.padding).sum()))
        local = LocalRow.from_batch(batch)
        loss = model(local, objective).losses["model"]
        loss.backward()
        with torch.no_grad():
            return float(loss), model.logits(model(local))

    for router in balance.routers(model):  # an uneven load, so that the auxiliary loss has a gradient
        router.load.copy_(torch.linspace(0.2, 1.8, len(router.load)))
    together, logits = run(row)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    apart, difference = 0.0, 0.0
    for alone, here, there in pieces(row):
        loss, alone_logits = run(alone)
        apart += loss
        difference = max(difference, float((logits[here] - alone_logits[there]).abs().max()))
    worst = max(
        float((parameter.grad - gradients[name]).abs().max() / gradients[name].abs().max().clamp(min=1e-6))
        for name, parameter in model.named_parameters()
    )
    platform.parallel.destroy()
    return difference, together, apart, worst


@pytest.mark.parametrize("changes", [{}, {"mtp_num_hidden_layers": 1}], ids=["plain", "mtp"])
def test_logits_loss_and_gradients_of_packed_samples_are_those_of_each_alone(distributed, changes):
    difference, together, apart, worst = distributed(1, packed_and_alone, changes)[0]
    assert difference < 2e-5
    assert apart == pytest.approx(together, rel=1e-6)
    assert worst < 1e-4


def inputs_of_both(rank, world_size):
    """(T, H) what the first layer of the model is given, and what multi-token prediction is, of a row with media."""
    from omni_train import platform
    from omni_train.models.row import LocalRow
    from omni_train.models.thinker import build_chunks
    from omni_train.objectives.base import GlobalBatch
    from omni_train.objectives.language_modelling import LanguageModelling

    recipe = small_recipe(**encoders(), mtp_num_hidden_layers=1)
    platform.parallel.initialize(recipe.parallel, 19)
    model, seen = build_chunks(recipe)[0], []
    model.decoder.register_forward_pre_hook(lambda _, __, given: seen.append(given["hidden_states"]), with_kwargs=True)
    model.mtp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batch = add_media(random_row(LENGTHS, 96, seed=4), [130, 49], [(1, 4, 6), (3, 2, 4)], seed=5)
    objective = partial(LanguageModelling(40, 1.0, by_modality=True), batch=GlobalBatch(1.0, 0, True))
    model(LocalRow.from_batch(batch, media=True), objective).losses["model"].backward()
    platform.parallel.destroy()
    return [one.detach()[:, 0] for one in seen], batch.audio_slots, batch.vision_slots


def test_multi_token_prediction_reads_what_the_model_gets_at_the_next_token(distributed):
    ((given, following), *slots) = distributed(1, inputs_of_both)[0]
    assert all(places.max() > 0 for places in slots)  # a token is before some
    torch.testing.assert_close(following[:-1], given[1:], rtol=0, atol=0)


def loads_by_layer(rank, world_size, parallel):
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine
    from tests.support.thinker import global_batches

    recipe = small_recipe(parallel, mtp_num_hidden_layers=1)
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    engine.train_step(global_batches(1)[0], learning_rate=1e-3)
    return engine.expert_loads()


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(pipeline=2, virtual_pipeline=2)])
def test_expert_load_is_reported_for_every_moe_layer_of_the_model(distributed, parallel):
    for loads in distributed(parallel.pipeline, loads_by_layer, parallel):
        assert sorted(loads) == [-2, 2, 4, 6, 8]
        for load in loads.values():
            assert len(load) == 6
            assert sum(load) == pytest.approx(6.0)


def devices_of_tensors(rank, world_size):
    """Kinds of device that a Thinker's tensors lie on where the process computes on another than the CPU."""
    from unittest.mock import patch

    from omni_train import platform
    from omni_train.models.thinker import build_chunks
    from omni_train.platform import cpu

    recipe = small_recipe(**encoders(), mtp_num_hidden_layers=1)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    cpu.install("meta")
    try:
        with patch.object(platform, "device", return_value=torch.device("meta")):
            (chunk,) = build_chunks(recipe)
        return {tensor.device.type for tensor in (*chunk.parameters(), *chunk.buffers())}
    finally:
        cpu.install("cpu")


def test_every_tensor_is_where_the_process_computes(distributed):
    """Megatron makes its routers on the CPU, and leaves it to the trainer to move them."""
    assert distributed(1, devices_of_tensors) == [{"meta"}]
