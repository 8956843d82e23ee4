"""Muon: who trains what, the update of each matrix, the same numbers in every layout, and how much each rank keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_train.recipe.schema import (
    CheckpointConfig,
    OptimizerConfig,
    OptimizerName,
    ParallelConfig,
    ParamGroupConfig,
    Precision,
)
from tests.support.pool import RankFailed
from tests.support.thinker import encoders, media_batches, small_recipe

pytest.importorskip("emerging_optimizers", reason="Muon needs the package emerging-optimizers")

SENSES = encoders(audio_num_attention_heads=4, vision_num_heads=4)


def muon_engine(parallel, **changes):
    from omni_train import platform
    from omni_train.training.engines.megatron import MegatronEngine

    groups = [ParamGroupConfig(match="audio_encoder.*", lr_factor=0.5)]
    optimizer = OptimizerConfig(name=OptimizerName.muon, lr=3e-4, min_lr=0.0, clip_grad=0.0, eps=1e-4, groups=groups)
    recipe = small_recipe(parallel, optimizer=optimizer, **(SENSES | changes))
    platform.parallel.initialize(parallel, recipe.seed)
    return MegatronEngine(recipe)


def step(engine, number: int) -> None:
    from omni_train import platform

    world, mine = platform.parallel.data_world_size(), platform.parallel.data_rank()
    rows = media_batches(number + 1)[number]
    share = len(rows) // world
    assert engine.train_step(rows[mine * share : (mine + 1) * share], learning_rate=1e-2, step=number).updated


def trained_by(rank, world_size, parallel):
    """Names of the parameters that Muon trains, and of those that AdamW does."""
    engine = muon_engine(parallel, mtp_num_hidden_layers=1)
    names = {parameter: name for chunk in engine.chunks for name, parameter in chunk.module.global_parameters()}
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for part in engine.optimizer.chained_optimizers:
        muon = type(part).__name__ == "DistributedMuon"
        found[muon] |= {names[parameter] for buffer in part.buffers for parameter in buffer.params}
    assert not found[True] & found[False]
    assert found[True] | found[False] == set(names.values())
    return found[True], found[False]


def test_muon_trains_the_matrices_of_the_stack_and_adamw_all_else(distributed):
    muon, adamw = distributed(1, trained_by, ParallelConfig())[0]
    assert {name.split(".", 3)[-1] for name in muon if name.startswith("decoder.")} == {
        "self_attention.in_proj.weight",
        "self_attention.out_proj.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.router.weight",
        "mlp.experts.linear_fc1.weight",
        "mlp.experts.linear_fc2.weight",
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.linear_fc2.weight",
    }
    assert {name for name in muon if name.startswith(("mtp.pro", "audio_adapter", "vision_adapter"))} == {
        "mtp.projection.weight",
        "audio_adapter.linear_fc1.weight",
        "audio_adapter.linear_fc2.weight",
        "vision_adapter.merger.mlp.linear_fc1.weight",
        "vision_adapter.merger.mlp.linear_fc2.weight",
    }
    assert {name.split(".", 4)[-1] for name in muon if name.startswith(("audio_encoder.layers", "vision_enc"))} == {
        "linear_qkv.weight",
        "linear_proj.weight",
        "linear_fc1.weight",
        "linear_fc2.weight",
    }
    for ending in (
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "vision_encoder.position_embedding.weight",
        "vision_encoder.patch_embedding.weight",
        "decoder.layers.1.mlp.shared_experts.gate_weight",
        "decoder.layers.0.self_attention.conv1d.weight",
        "decoder.layers.0.self_attention.A_log",
        "final_norm.weight",
    ):
        assert ending in adamw
    assert {name for name in muon if "conv" in name} == {"audio_encoder.conv_out.weight"}  # a projection
    assert not [name for name in muon if "norm" in name or name.endswith("bias")]


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic iterations, as Muon's paper writes them."""
    iterations = [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]
    x = matrix / matrix.norm()
    for a, b, c in iterations:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def change_and_gradients(rank, world_size):
    """Of one rank, by name: the parameters before and after two steps, and the gradients of both."""
    engine = muon_engine(ParallelConfig())
    named = dict(engine.chunks[0].module.global_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    prepare, gradients = engine.optimizer.prepare_grads, []

    def keep():
        gradients.append({name: parameter.main_grad.clone() for name, parameter in named.items()})
        return prepare()

    engine.optimizer.prepare_grads = keep
    step(engine, 0)
    step(engine, 1)
    return before, {name: parameter.detach().clone() for name, parameter in named.items()}, gradients


def expected(weight: torch.Tensor, gradients: list[torch.Tensor], rate: float) -> torch.Tensor:
    """A matrix after Muon's steps: Nesterov momentum 0.95, decay 0.1, updates as large as AdamW's."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        update = newton_schulz(0.95 * momentum + 0.05 * gradient)
        weight = weight * (1 - rate * 0.1) - rate * 0.2 * max(weight.shape) ** 0.5 * update
    return weight


def test_each_map_of_a_fused_or_stacked_parameter_is_a_matrix_of_its_own(distributed):
    before, after, gradients = distributed(1, change_and_gradients)[0]

    def same(name: str, *place) -> None:
        mine = [one[name][place] for one in (before, after, *gradients)]
        want = expected(mine[0], mine[2:], 5e-3 if name.startswith("audio_encoder") else 1e-2)
        assert torch.allclose(mine[1], want, atol=2e-3 * (want - mine[0]).abs().max()), (name, place)

    def rows(*pieces: range) -> torch.Tensor:
        return torch.tensor([row for piece in pieces for row in piece])

    experts = "decoder.layers.3.mlp.experts."
    for expert in (0, 4):
        same(f"{experts}linear_fc1.weight", expert, slice(0, 24))  # gate
        same(f"{experts}linear_fc1.weight", expert, slice(24, 48))  # up
        same(f"{experts}linear_fc2.weight", expert)
    same("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", slice(0, 28))
    same("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", slice(28, 56))
    same("decoder.layers.1.mlp.router.weight")
    start = 0
    for height in (48, 48, 160, 160, 8, 8):  # query, key, value, z, beta, alpha
        same("decoder.layers.0.self_attention.in_proj.weight", slice(start, start + height))
        start += height
    qkv = "decoder.layers.4.self_attention.linear_qkv.weight"  # two groups of 2 queries, 2 gates, a key, a value
    same(qkv, rows(range(48), range(144, 192)))
    same(qkv, rows(range(48, 96), range(192, 240)))
    same(qkv, rows(range(96, 120), range(240, 264)))
    same(qkv, rows(range(120, 144), range(264, 288)))
    for start in (0, 6, 12):  # an encoder's: a query, a key and a value of each of four heads
        qkv = "audio_encoder.layers.0.self_attention.linear_qkv.weight"
        same(qkv, rows(*(range(head + start, head + start + 6) for head in (0, 18, 36, 54))))


def assert_tensor_ranks_agree(engine) -> None:
    """On what they all hold; a checkpoint has that of one of them."""
    from megatron.core import parallel_state

    group, first = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_src_rank()
    for name, parameter in (pair for chunk in engine.chunks for pair in chunk.module.global_parameters()):
        if not getattr(parameter, "tensor_model_parallel", False):
            theirs = parameter.detach().clone()
            torch.distributed.broadcast(theirs, first, group=group)
            assert torch.equal(theirs, parameter), name


def saved(rank, world_size, parallel, folder, start, steps, batch_numel=None):
    """Steps from the checkpoint `start` (None: from initialisation), each saved; the last checkpoint's path."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.training.engines import whole_matrices

    usual = whole_matrices._BATCH_NUMEL
    whole_matrices._BATCH_NUMEL = batch_numel or usual
    engine = muon_engine(parallel)
    whole_matrices._BATCH_NUMEL = usual
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False, keep=9), engine.recipe.model)
    if start is not None:
        store.load(Path(start), engine.chunks, engine.optimizer)
    for number in steps:
        step(engine, number)
        store.save(number + 1, engine.chunks, engine.optimizer, {}, None)
    assert_tensor_ranks_agree(engine)
    store.close()
    platform.parallel.destroy()
    return str(store.latest())


def tensors(rank, world_size, checkpoint):
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_plain_tensors(checkpoint)
    return {name: value.float() for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def one_rank(distributed, tmp_path_factory):
    """One rank's checkpoint after a step, its tensors, and those after the next."""
    folder = tmp_path_factory.mktemp("muon")
    second = Path(distributed(1, saved, ParallelConfig(), folder, None, (0, 1))[0])
    first = second.with_name("step_00000001")
    return first, *(distributed(1, tensors, str(path))[0] for path in (first, second))


LAYOUTS = {
    "DP2": (2, ParallelConfig()),
    "PP2-VPP2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "EP2": (2, ParallelConfig(expert=2)),
    "TP4, more than key-value heads": (4, ParallelConfig(tensor=4)),
    "CP2-DP2-ETP2": (4, ParallelConfig(context=2, expert_tensor=2)),
    "TP2-PP2-EP2": (4, ParallelConfig(tensor=2, pipeline=2, expert=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_goes_on_from_one_ranks_checkpoint_with_the_same_update(distributed, one_rank, tmp_path, name):
    world_size, parallel = LAYOUTS[name]
    start, before, want = one_rank
    batch_numel = 3000 if world_size == 4 else None  # several rounds
    path = distributed(world_size, saved, parallel, tmp_path, start, (1,), batch_numel)[0]
    have = distributed(1, tensors, path)[0]
    assert set(have) == set(want)
    momenta = [key for key in want if key.startswith("optimizer.state.momentum_buffer.")]
    assert "optimizer.state.momentum_buffer.decoder.layers.1.mlp.experts.linear_fc1.weight" in momenta
    for key in want:
        change = want[key] - before[key]
        assert (have[key] - want[key]).abs().max() <= 1e-2 * change.abs().max() + 1e-9, key


def resumed(rank, world_size, folder, precision):
    """Whether a step after a checkpoint is the same, bit for bit, in the run that wrote it and in one that read it."""
    from omni_train.checkpoint.sharded import CheckpointStore

    engine = muon_engine(ParallelConfig(expert=2), precision=precision)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), engine.recipe.model)
    step(engine, 0)
    store.save(1, engine.chunks, engine.optimizer, {}, None)
    other = type(engine)(engine.recipe)
    store.load(store.latest(), other.chunks, other.optimizer)
    step(engine, 1)
    step(other, 1)
    pairs = zip(engine.chunks[0].parameters(), other.chunks[0].parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_resumed_run_takes_the_same_step_bit_for_bit(distributed, tmp_path, precision):
    assert all(distributed(2, resumed, tmp_path, precision))


def state_bytes(rank, world_size, parallel):
    """Bytes of master weights and optimizer state on this rank: (Muon's and AdamW's dense, Muon's of experts)."""
    engine = muon_engine(parallel, precision=Precision.bf16)
    sizes = {False: 0, True: 0}
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors = [parameter, *part.optimizer.state[parameter].values()]
                sizes[group["is_expert_parallel"]] += sum(t.numel() * t.element_size() for t in tensors if t.dim())
    return sizes[False], sizes[True]


def test_optimizer_state_per_rank_falls_with_data_ranks_and_experts_with_theirs(distributed):
    (dense, experts), *_ = distributed(1, state_bytes, ParallelConfig())
    matrices = 4 * 6 * (48 * 48 + 48 * 24)
    assert experts == matrices * 8  # four bytes of weights and four of momentum
    for parallel, expert_ranks in ((ParallelConfig(), 4), (ParallelConfig(expert=2), 4), (ParallelConfig(tensor=2), 4)):
        sizes = distributed(4, state_bytes, parallel)
        for mine, mine_of_experts in sizes:
            assert mine == pytest.approx(dense / 4, rel=0.1)
            assert mine_of_experts == pytest.approx(experts / expert_ranks, rel=0.05)


def other_optimizer(rank, world_size, folder, first, second):
    from omni_train.checkpoint.sharded import CheckpointStore

    engine = muon_engine(ParallelConfig())
    engine.recipe.optimizer.name = first
    engine = type(engine)(engine.recipe)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), engine.recipe.model)
    step(engine, 0)
    store.save(1, engine.chunks, engine.optimizer, {}, None)
    engine.recipe.optimizer.name = second
    other = type(engine)(engine.recipe)
    store.load(store.latest(), other.chunks, other.optimizer)


@pytest.mark.parametrize("first", list(OptimizerName))
def test_a_run_with_one_optimizer_does_not_go_on_with_the_other(distributed, tmp_path, first):
    (second,) = set(OptimizerName) - {first}
    with pytest.raises(RankFailed, match="take the optimizer= and trainable= of the run that wrote it"):
        distributed(1, other_optimizer, tmp_path, first, second)
