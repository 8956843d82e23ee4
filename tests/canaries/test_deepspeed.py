"""What omni_train relies on of DeepSpeed's insides: one lone rank's engine, made as the ZeRO engine makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from omni_train.recipe.schema import OptimizerConfig, Precision, ZeroConfig
from omni_train.training.engines import deepspeed as ours
from omni_train.training.engines import zero_parameters
from tests.canaries.table import relied_on

ENGINE, STORE = "omni_train/training/engines/deepspeed.py", "omni_train/checkpoint/zero.py"


@pytest.fixture
def wrapped(alone) -> Iterator[Callable]:
    """``wrapped(stage)`` is a linear layer in DeepSpeed's hands, after one step."""
    engines = []

    def make(stage: int):
        recipe = SimpleNamespace(
            zero=ZeroConfig(stage=stage),
            optimizer=OptimizerConfig(lr=0.1, min_lr=0.1, clip_grad=1.0),
            precision=Precision.fp32,
        )
        module = torch.nn.Linear(4, 3)
        engine = ours.wrap(ours.import_deepspeed(), recipe, module, [{"params": [*module.parameters()]}])
        engines.append(engine)
        step(engine)
        return engine

    yield make
    for engine in engines:
        engine.destroy()
    ours.forget_groups()


def step(engine, factor: float = 1.0) -> float:
    engine.backward(engine(torch.ones(2, 4)).sum() * factor, scale_wrt_gas=False)
    engine.step()
    return float(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", [0, 2])
def test_checkpoints(stage: int, wrapped, tmp_path, monkeypatch):
    from omni_train.checkpoint.zero import _read_share, _shares

    engine, folder = wrapped(stage), tmp_path / "[ab]"  # a pattern, if anything takes it for one
    with relied_on("deepspeed", "save_checkpoint writes all by checkpoint_engine.save(state_dict, path)", STORE):
        shares = _shares({"net": engine}, folder)
        assert shares
        assert all(isinstance(share, dict) for share in shares.values())
        assert {path.parent for path in shares} == {folder / "net"}
        assert not [*tmp_path.iterdir()]
    folder.joinpath("net").mkdir(parents=True)
    for path, share in shares.items():
        torch.save(share, path)
    read: list[str] = []
    with relied_on("deepspeed", "load_checkpoint reads those files, by checkpoint_engine.load(path, …) alone", STORE):
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it reads by itself"))
        engine.checkpoint_engine.load = lambda path, map_location=None: read.append(path) or shares[Path(path)]
        engine._get_all_ckpt_names = lambda folder, tag: [engine._get_ckpt_name(folder, tag)]
        path, _ = engine.load_checkpoint(str(folder), tag="net")
        assert path is not None
        assert {Path(name) for name in read} == shares.keys()
    monkeypatch.undo()
    with relied_on("deepspeed", "its files name no other classes than we let them", STORE):
        for path in shares:
            assert _read_share(str(path)).keys() == shares[path].keys()


@relied_on("deepspeed", "at stage 0 it reads `overflow` and `_global_grad_norm` of the optimizer", ENGINE)
def test_stage_0(wrapped):
    engine = wrapped(0)
    assert isinstance(engine.optimizer, ours.AdamW)
    assert step(engine) == pytest.approx(math.sqrt(4 * 3 * 2**2 + 3 * 2**2))
    assert engine.was_step_applied()
    step(engine, math.nan)
    assert not engine.was_step_applied()


@relied_on("deepspeed", "a gradient that is no number makes a step be skipped", ENGINE)
def test_spoiled_steps(wrapped):
    engine = wrapped(2)
    before = engine.module.weight.clone()
    engine.backward(engine(torch.ones(2, 4)).sum(), scale_wrt_gas=False)
    ours.skip_next_step(engine)
    engine.step()
    assert not engine.was_step_applied()
    assert torch.equal(engine.module.weight, before)


@relied_on(
    "deepspeed",
    "at stage 3 a parameter has ds_tensor and ds_shape, in order of ranks",
    "omni_train/training/engines/zero_parameters.py",
)
def test_stage_3(wrapped):
    import deepspeed

    engine = wrapped(3)
    parameter = engine.module.weight
    with deepspeed.zero.GatheredParameters([parameter]):
        whole = parameter.detach().clone()
    assert parameter.numel() == 0
    assert zero_parameters.shard(parameter).numel() == whole.numel()
    assert zero_parameters.full_shape(parameter) == whole.shape
    assert torch.equal(zero_parameters.whole(parameter, zero_parameters.shard(parameter)), whole)
    assert torch.equal(zero_parameters.share_of(parameter, whole), zero_parameters.shard(parameter))


@relied_on("deepspeed", "its process groups and counts are where forget_groups looks for them", ENGINE)
def test_what_is_global(wrapped):
    import deepspeed
    from deepspeed.utils import groups

    first = [parameter.ds_id for parameter in wrapped(3).module.parameters()]
    assert deepspeed.comm.is_initialized()
    assert _process_groups(vars(groups))
    ours.forget_groups()
    assert not _process_groups(vars(groups))
    assert not deepspeed.comm.is_initialized()
    assert [parameter.ds_id for parameter in wrapped(3).module.parameters()] == first


@relied_on("deepspeed", "an entry of __compatible_ops__ keeps it from compiling shm_comm", ENGINE)
def test_nothing_is_compiled(alone):
    ours.import_deepspeed()
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None
    ours.forget_groups()


def _process_groups(value) -> list:
    if isinstance(value, torch.distributed.ProcessGroup):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [group for part in parts for group in _process_groups(part)]
