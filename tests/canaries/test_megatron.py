"""What omni_train relies on of Megatron-core's insides: optimizers of one lone rank, checkpoints, layers."""

from __future__ import annotations

import ast
import multiprocessing
import threading
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from omni_train import platform
from omni_train.errors import UserError
from omni_train.recipe.schema import OptimizerConfig, OptimizerName, Precision
from tests.canaries.source import module_file, tree
from tests.canaries.table import relied_on

ADAPTED, MUON = "omni_train/checkpoint/distributed_optimizer.py", "omni_train/training/engines/muon.py"
WRITING, READING = "omni_train/checkpoint/sharded_write.py", "omni_train/checkpoint/sharded_files.py"


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).float())


def wrapped(muon: bool = False):
    """A net, its weights in two precisions, as the Megatron engine wraps it, and the optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from omni_train.training.engines import optimizer
    from omni_train.training.engines.muon import mark_matrices

    net = Net()
    if muon:
        mark_matrices(net)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    chunk = DistributedDataParallel(config, ddp, net)
    name = OptimizerName.muon if muon else OptimizerName.adamw
    recipe = SimpleNamespace(optimizer=OptimizerConfig(name=name, lr=0.1), precision=Precision.bf16)
    return net, chunk, optimizer.build_optimizer(recipe, [chunk], [*net.named_parameters()])


@pytest.fixture
def part(alone):
    """The one distributed optimizer of a net, and the net."""
    net, _, optimizer = wrapped()
    [part] = getattr(optimizer, "chained_optimizers", [optimizer])
    return part, net


@relied_on(
    "megatron.core", "a distributed optimizer has groups of models' and masters' weights, fp32 ones first", ADAPTED
)
def test_groups(part):
    part, net = part
    first, second = list(net.first.parameters()), list(net.second.parameters())
    assert {*chain(*part.model_float16_groups)} == {*first}
    assert {*chain(*part.model_fp32_groups)} == {*second}
    assert len(part.model_fp32_groups) == len(part.model_float16_groups) == len(part.optimizer.param_groups)
    for kind, dtype, count in (
        (part.shard_float16_groups, torch.bfloat16, 2),
        (part.shard_fp32_from_float16_groups, torch.float32, 2),
        (part.shard_fp32_groups, torch.float32, 2),
    ):
        assert [shard.dtype for shard in chain(*kind)] == [dtype] * count
    for parameter, (group, place) in part.model_param_group_index_map.items():
        assert part.optimizer.param_groups[group]["params"][place].numel() == parameter.numel()


@relied_on("megatron.core", "a gradient buffer says where its parameters are, and a bucket its padding", ADAPTED, MUON)
def test_buffers(part):
    part, net = part
    assert sum(len(buffer.param_index_map) for buffer in part.buffers) == 4
    for buffer in part.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            assert end - start == parameter.numel()
            bucket = buffer.buckets[bucket]
            assert parameter in bucket.params
            assert 0 <= start - bucket.offset < bucket.numel_unpadded <= bucket.grad_data.numel()
            parameter.main_grad.fill_(7)
            assert bucket.grad_data[start - bucket.offset : end - bucket.offset].eq(7).all()


@relied_on(
    "megatron.core", "a load asks the optimizer itself to restore each parameter, and to make its states", ADAPTED
)
def test_state(part):
    from omni_train.checkpoint.sharded import state_metadata

    part, net = part
    restored, made = [], []
    theirs, make = part._set_main_param_and_optimizer_states, part.sharded_param_state_fully_reshardable
    part._set_main_param_and_optimizer_states = lambda model, tensors: (restored.append(model), theirs(model, tensors))
    part.sharded_param_state_fully_reshardable = lambda *args, **named: (made.append(1), make(*args, **named))[1]
    order = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
    keys = ("fp32_param", *part.optimizer_state_keys)
    assert keys == ("fp32_param", "exp_avg", "exp_avg_sq")
    state = [{key: torch.full_like(parameter, 2, dtype=torch.float32) for key in keys} for parameter in order]
    part.load_parameter_state_from_fully_reshardable(dict(enumerate(state)))
    assert {*restored} == {*net.parameters()}
    assert all(shard.eq(2).all() for group in part.optimizer.param_groups for shard in group["params"])
    part.sharded_state_dict(_sharded(net), metadata=state_metadata())
    assert made


def _sharded(net: torch.nn.Module) -> dict:
    from megatron.core.dist_checkpointing import ShardedTensor

    tensors = {name: ShardedTensor.from_rank_offsets(name, value) for name, value in net.named_parameters()}
    return {"model": tensors}


@relied_on("megatron.core", "marked parameters have buffers of their own, and each optimizer gathers its own", MUON)
def test_muon(alone):
    pytest.importorskip("emerging_optimizers")
    from omni_train.training.engines.muon import DistributedMuon

    net, chunk, optimizer = wrapped(muon=True)
    [muon] = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedMuon)]
    owned = {parameter for buffer in muon.buffers for parameter in buffer.params}
    assert owned == {net.first.weight, net.second.weight}
    others = [part for part in optimizer.chained_optimizers if part is not muon]
    assert {p for part in others for buffer in part.buffers for p in buffer.params} == {*net.parameters()} - owned
    assert {group["is_expert_parallel"] for part in others for group in part.optimizer.param_groups} == {False}
    gathered = []
    chunk._start_bucket_group_param_sync = lambda group, force_sync: gathered.extend(group.buckets)
    muon.start_param_sync_for_bucket_group_subset()
    assert {parameter for bucket in gathered for parameter in bucket.params} == owned


def test_checkpoints(alone, tmp_path, monkeypatch):
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from omni_train.checkpoint import sharded, sharded_files
    from omni_train.checkpoint.sharded_write import Write, plan, seal, staged

    def state(value: torch.Tensor) -> dict:
        return {"weight": ShardedTensor.from_rank_offsets("weight", value)}

    weight, before = torch.randn(3, 2), threading.active_count()
    children = multiprocessing.active_children()
    with relied_on("megatron.core", "a save can be planned without a process or a file", WRITING):
        planned = plan(state(weight) | {"progress": {"step": 3}}, tmp_path, check=True)
        assert multiprocessing.active_children() == children
        assert threading.active_count() == before
        assert not [*tmp_path.iterdir()]
        for path, name, (objects, tensors) in planned.buckets:
            assert str(path) == str(tmp_path / name)
            assert all(len(pair) == 2 for pair in (*objects, *tensors))
        assert {item.index.fqn for _, _, (_, tensors) in planned.buckets for item, _ in tensors} == {"weight"}
    with relied_on("torch", "_write_item writes what is planned, and its results are what seals it", WRITING):
        write = Write(staged(planned.buckets))
        write.run()
        assert write.error is None
        seal(planned, tmp_path, [write.results])
        assert {path.name for path in tmp_path.iterdir()} >= {".metadata", "metadata.json", *write.digests}
    with relied_on("torch", "its metadata names what our reader knows, and no more", READING):
        reader = sharded_files.Reader(tmp_path)
        known = FileSystemReader(tmp_path).read_metadata()
        assert reader.read_metadata().storage_data == known.storage_data
        assert reader.read_metadata().state_dict_metadata.keys() == known.state_dict_metadata.keys()
    with relied_on(
        "megatron.core", "it reads by the reader that _get_filesystem_reader gives, and in no other way", READING
    ):
        monkeypatch.setattr(FileSystemReader, "read_metadata", lambda *_, **__: 1 / 0)
        loaded = sharded.load_sharded(state(torch.zeros(3, 2)), tmp_path)
        assert torch.equal(loaded["weight"], weight)
        assert sharded.read_progress(tmp_path) == {"step": 3}


@relied_on("megatron.core", "it warns of parameters cut out of the wrong places as the filter expects", ADAPTED)
def test_the_warning_that_is_refused():
    import logging

    from megatron.core.optimizer import distrib_optimizer

    from omni_train.checkpoint.distributed_optimizer import _refuse_wrong_offsets

    record = logging.LogRecord("a", logging.WARNING, "b", 1, "'x' param range exceeds the buffer", None, None)
    with pytest.raises(UserError):
        _refuse_wrong_offsets(record)
    assert distrib_optimizer.logger.name == distrib_optimizer.__name__
    file, _ = module_file(distrib_optimizer.__name__)
    texts = [node.value for node in ast.walk(tree(file)) if isinstance(node, ast.Constant)]
    assert any("param range exceeds" in text for text in texts if isinstance(text, str))


@pytest.mark.parametrize(
    "module", ["recompute", "transformer.attention", "transformer.transformer_layer", "transformer.moe.moe_layer"]
)
def test_layers_recompute_by_the_function_that_we_replace(module: str):
    with relied_on(
        "megatron.core", f"{module} calls tensor_parallel.checkpoint by that name", "omni_train/nn/recompute.py"
    ):
        file, rest = module_file(f"megatron.core.{module}")
        assert file and not rest
        calls = [ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
        recomputing = {call for call in calls if call.split(".")[-1] == "checkpoint" and not call.startswith("self.")}
        assert recomputing == {"tensor_parallel.checkpoint"}


@pytest.mark.parametrize(
    ("module", "names"),
    [("common", {"l2norm"}), ("gdn", {"causal_conv1d"})],
)
def test_gated_delta_net_calls_the_kernels_that_we_replace(module: str, names: set[str]):
    with relied_on("megatron.core", f"{module} calls {names} of its own globals", "omni_train/nn/delta_rule.py"):
        file, _ = module_file(f"megatron.core.ssm.gated_delta_net.{module}")
        calls = {ast.unparse(node.func) for node in ast.walk(tree(file)) if isinstance(node, ast.Call)}
        assert names <= calls


@relied_on("megatron.core", "random states are told apart by name, and forked", "omni_train/platform/cpu.py")
def test_random_states():
    platform.setup()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    assert tracker.states_.keys() == tracker.get_states().keys() == {"a"}
    with tracker.fork("a"):
        first = torch.rand(1)
    with tracker.fork("a"):
        assert torch.rand(1) != first
