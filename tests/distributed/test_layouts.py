"""The layout changes nothing: the same losses and gradient norms from one initial checkpoint, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_train.recipe.schema import CheckpointConfig, OptimizerConfig, ParallelConfig, ParamGroupConfig, Recompute
from tests.support.thinker import encoders, global_batches, media_batches, small_recipe

LAYOUTS = {
    "TP2": (2, ParallelConfig(tensor=2)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "CP2": (2, ParallelConfig(context=2)),
    "EP2": (2, ParallelConfig(expert=2)),
    "DP2": (2, ParallelConfig()),
    "PP2-VPP2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "TP2-PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "TP2-CP2": (4, ParallelConfig(tensor=2, context=2)),
    "TP2-PP2-EP2": (4, ParallelConfig(tensor=2, pipeline=2, expert=2)),
    "DP2-EP2-ETP2": (4, ParallelConfig(tensor=2, expert=2, expert_tensor=2)),
}
MTP = {"mtp_num_hidden_layers": 1}


def train(rank, world_size, parallel, folder, start, save, changes, steps=4):
    """Train on fixed global batches from the checkpoint `start` (None: write it), returning metrics by step."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model
    from omni_train.training.engines.megatron import MegatronEngine

    recipe = small_recipe(parallel, **changes)
    platform.parallel.initialize(parallel, recipe.seed)
    engine = MegatronEngine(recipe)
    if start is not None:
        load_model(engine.chunks, Path(start), recipe.model)
        engine.optimizer.reload_model_params()
    if save is not None:
        store = CheckpointStore(Path(folder) / save, CheckpointConfig(asynchronous=False), recipe.model)
        store.save(0, engine.chunks, engine.optimizer, {}, None)
        store.close()
    world, mine = platform.parallel.data_world_size(), platform.parallel.data_rank()
    history = []
    batches = media_batches(steps) if recipe.model.audio else global_batches(steps)
    for step, rows in enumerate(batches):
        share = len(rows) // world
        result = engine.train_step(rows[mine * share : (mine + 1) * share], learning_rate=3e-4, step=step)
        assert result.updated
        history.append(result.metrics)
    platform.parallel.destroy()
    return history


@pytest.fixture(scope="module")
def initial_with_mtp(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    plain = distributed(1, train, ParallelConfig(), folder, None, "initial", MTP)[0]
    return folder, folder / "initial" / "step_00000000", plain


@pytest.fixture(scope="module")
def initial(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    plain = distributed(1, train, ParallelConfig(), folder, None, "initial", {})[0]
    return folder, folder / "initial" / "step_00000000", plain


@pytest.fixture(scope="module")
def initial_omni_with_mtp(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni-mtp")
    plain = distributed(1, train, ParallelConfig(), folder, None, "initial", encoders() | MTP, 2)[0]
    return folder, folder / "initial" / "step_00000000", plain


def assert_same(expected, history):
    for step, (want, have) in enumerate(zip(expected, history, strict=True)):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-4), (step, want, have)
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3), (step, want, have)
        for name in set(want) - {"loss", "grad_norm"}:
            assert have[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), (step, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_rank(distributed, initial, name):
    folder, start, expected = initial
    world_size, parallel = LAYOUTS[name]
    for history in distributed(world_size, train, parallel, folder, start, None, {}):
        assert_same(expected, history)


@pytest.fixture(scope="module")
def initial_omni(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni")
    plain = distributed(1, train, ParallelConfig(), folder, None, "initial", encoders())[0]
    return folder, folder / "initial" / "step_00000000", plain


@pytest.mark.parametrize("name", ["TP2", "PP2", "CP2", "EP2", "TP2-PP2-EP2"])
def test_sound_and_vision_train_alike_in_every_layout(distributed, initial_omni, name):
    """With two data ranks one of them has no sound and the other no images."""
    folder, start, expected = initial_omni
    world_size, parallel = LAYOUTS[name]
    for history in distributed(world_size, train, parallel, folder, start, None, encoders()):
        assert_same(expected, history)
        assert any("loss_video" in metrics for metrics in history)


DEEPSTACK = encoders(vision_deepstack_visual_indexes=[0, 1])


def test_deepstack_trains_alike_when_everything_is_recomputed(distributed, tmp_path):
    """Its features are used again in the backward pass of the layers that add them."""
    expected = distributed(1, train, ParallelConfig(), tmp_path, None, "deep", DEEPSTACK, 2)[0]
    start = tmp_path / "deep" / "step_00000000"
    again = DEEPSTACK | {"recompute": Recompute.full}
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(context=2)):
        ranks = parallel.tensor * parallel.context
        for history in distributed(ranks, train, parallel, tmp_path, start, None, again, 2):
            assert_same(expected, history)
    for layout, part in (("PP2", "vision_*"), ("TP2", "*.deepstack_mergers.*")):
        alone = {"trainable": [part]}
        expected = distributed(1, train, ParallelConfig(), tmp_path, start, None, DEEPSTACK | alone, 2)[0]
        for history in distributed(2, train, LAYOUTS[layout][1], tmp_path, start, None, again | alone, 2):
            assert_same(expected, history)


def train_parts(rank, world_size, parallel, folder, start):
    """Two steps of each part by itself, all else locked: the gradient norms are then its own."""
    return {
        part: train(rank, world_size, parallel, folder, start, None, encoders() | {"trainable": [f"{part}.*"]}, 2)
        for part in ("audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter")
    }


@pytest.fixture(scope="module")
def parts_alone(distributed, initial_omni):
    folder, start, _ = initial_omni
    return distributed(1, train_parts, ParallelConfig(), folder, start)[0]


@pytest.mark.parametrize("name", ["TP2", "CP2", "DP2", "TP2-PP2-EP2"])
def test_each_encoder_and_adapter_alone_trains_alike_in_every_layout(distributed, initial_omni, parts_alone, name):
    """Later pipeline stages then train nothing, and must pass the gradients on all the same."""
    folder, start, _ = initial_omni
    world_size, parallel = LAYOUTS[name]
    for histories in distributed(world_size, train_parts, parallel, folder, start):
        for part, history in histories.items():
            assert_same(parts_alone[part], history)
            assert all(metrics["grad_norm"] > 1e-4 for metrics in history)


@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_recomputation_changes_nothing(distributed, initial, recompute):
    folder, start, expected = initial
    for history in distributed(2, train, ParallelConfig(tensor=2), folder, start, None, {"recompute": recompute}):
        assert_same(expected, history)


EXPERTS_ALONE = {"trainable": ["*experts*", "*router*"]}
"""Behind a frozen embedding no activation needs a gradient before the first layer that trains."""


def train_recomputed(rank, world_size, parallel, folder, start, changes):
    """Two steps with each kind of recomputation."""
    return [
        train(rank, world_size, parallel, folder, start, None, changes | {"recompute": kind}, 2)
        for kind in (Recompute.selective, Recompute.full)
    ]


@pytest.mark.parametrize("name", ["ONE", "PP2", "TP2"])
def test_behind_frozen_inputs_recomputation_changes_nothing(distributed, initial_with_mtp, name):
    """Also of what is counted in the layers: the auxiliary loss and the experts' load."""
    folder, start, _ = initial_with_mtp
    expected = distributed(1, train, ParallelConfig(), folder, start, None, MTP | EXPERTS_ALONE, 2)[0]
    world_size, parallel = LAYOUTS.get(name, (1, ParallelConfig()))
    for histories in distributed(world_size, train_recomputed, parallel, folder, start, MTP | EXPERTS_ALONE):
        for history in histories:
            assert_same(expected, history)
            assert all(metrics["grad_norm"] > 0.01 for metrics in history)


@pytest.mark.parametrize("name", ["TP2", "CP2", "PP2", "TP2-PP2-EP2"])
def test_multi_token_prediction_trains_alike_in_every_layout(distributed, initial_with_mtp, name):
    """Its embedding stands on the last pipeline stage as well as on the first: both must see both gradients."""
    folder, start, expected = initial_with_mtp
    world_size, parallel = LAYOUTS[name]
    for history in distributed(world_size, train, parallel, folder, start, None, MTP):
        assert_same(expected, history)
        assert all("mtp_loss" in metrics for metrics in history)


@pytest.mark.parametrize("name", ["TP2", "CP2", "PP2-VPP2", "TP2-PP2-EP2"])
def test_multi_token_prediction_hears_and_sees_alike_in_every_layout(distributed, initial_omni_with_mtp, name):
    """It stands on the last pipeline stage, and what it reads of sound and vision comes from the first."""
    folder, start, expected = initial_omni_with_mtp
    world_size, parallel = LAYOUTS[name]
    for history in distributed(world_size, train, parallel, folder, start, None, encoders() | MTP, 2):
        assert_same(expected, history)


TIED = {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def initial_tied(distributed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    plain = distributed(1, train, ParallelConfig(), folder, None, "initial", TIED)[0]
    return folder, folder / "initial" / "step_00000000", plain


def test_tied_embeddings_train_alike_over_pipeline_stages(distributed, initial_tied):
    folder, start, expected = initial_tied
    for history in distributed(2, train, ParallelConfig(pipeline=2), folder, start, None, TIED):
        assert_same(expected, history)


@pytest.mark.parametrize("trainable", [["decoder.layers.2.*", "embedding.*"], ["decoder.layers.[06].*"]], ids=str)
def test_names_mean_the_same_parameters_on_every_pipeline_stage(distributed, initial_tied, trainable):
    """Layers are counted over all stages, and the last stage's copy of the embedding goes by the first's name."""
    folder, start, _ = initial_tied
    groups = [ParamGroupConfig(match="decoder.layers.6.*", lr_factor=40.0, weight_decay_factor=0.0)]
    chosen = TIED | {
        "trainable": trainable,
        "optimizer": OptimizerConfig(lr=3e-4, clip_grad=0.7, eps=1e-5, groups=groups),
    }
    expected = distributed(1, train, ParallelConfig(), folder, start, None, chosen)[0]
    for name in ("PP2", "PP2-VPP2"):
        world_size, parallel = LAYOUTS[name]
        for history in distributed(world_size, train, parallel, folder, start, None, chosen):
            assert_same(expected, history)
