"""The ZeRO engine: every stage and number of ranks takes the same steps, goes on exactly, and leaves plain files."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from omni_train.data.rows.base import Row
from omni_train.errors import UserError
from omni_train.models.config import params_dtype
from omni_train.objectives.base import NetworksObjective, Outcome
from omni_train.recipe.schema import (
    CheckpointConfig,
    EngineName,
    ParamGroupConfig,
    Precision,
    RecognitionConfig,
    ZeroConfig,
)
from tests.support.networks import lone_engine_network
from tests.support.pool import RankFailed
from tests.support.recognizer import TAG_END, recognizer_recipe, row_of, utterances
from tests.support.thinker import small_recipe


@dataclass
class Points(Row):
    inputs: torch.Tensor  # (B, 13)
    wanted: torch.Tensor  # (B, 5)


class Maker(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(13, 29), torch.nn.GELU(), torch.nn.Linear(29, 5))
        self.frozen = torch.nn.Linear(5, 5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.layers(x))


class Judge(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.Tanh(), torch.nn.Linear(17, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def makers_and_judges(recipe) -> dict[str, torch.nn.Module]:
    torch.manual_seed(recipe.seed + torch.distributed.get_rank())  # the engine must make the ranks equal
    return {"maker": Maker(), "judge": Judge()}


class Duel(NetworksObjective):
    """A maker is drawn to what is wanted and to what a judge takes for it; the judge learns to tell them apart."""

    def __init__(self, networks) -> None:
        self.networks = networks

    def weight(self, row: Points) -> float:
        return float(len(row.inputs))

    def tokens(self, row: Points) -> float:
        return float(len(row.inputs))

    def run(self, networks, row, batch) -> Outcome:
        total_weight, training = batch.weight, batch.training
        made = networks["maker"](row.inputs)
        far = (made - row.wanted).square().mean(1).sum() / total_weight
        judged = networks["judge"](torch.cat([made.detach(), row.wanted]))
        fooled, real = judged.chunk(2)
        told = ((1 + fooled).square() + (1 - real).square()).sum() / total_weight
        loss = far
        if training:
            looked = made.detach().requires_grad_()
            (pull,) = torch.autograd.grad((1 - networks["judge"].module(looked)).square().sum() / total_weight, looked)
            loss = far + 0.1 * (made * pull).sum()
        count = float(len(row.inputs))
        metrics = {"loss": (far.detach() * total_weight, count), "told": (told.detach() * total_weight, count)}
        return Outcome({"maker": loss, "judge": told}, metrics)

    def after_step(self, step):
        self.networks["maker"].seen += 1
        return {}


def duel() -> str:
    """The network's name, in this process too."""
    return lone_engine_network("duel", Duel, makers_and_judges)


def recipe_of(zero: ZeroConfig, precision: Precision):
    recipe = small_recipe(engine=EngineName.deepspeed, precision=precision, network=duel())
    recipe.zero = zero
    recipe.trainable = ["maker.layers.*", "judge.*"]
    recipe.optimizer.groups = [ParamGroupConfig(match="judge.*", lr_factor=0.5)]
    recipe.optimizer.ema_decay = 0.7
    recipe.optimizer.clip_grad = 0.4  # every step is clipped
    return recipe


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[list[Points]]:
    """Four rows of 2 to 5 points a step."""
    draw = torch.Generator().manual_seed(31)

    def points(size: int, width: int) -> torch.Tensor:
        return torch.randn(size, width, generator=draw).to(dtype)

    return [[Points(points(size, 13), points(size, 5)) for size in (3, 5, 2, 4)] for _ in range(steps)]


def train(rank, world_size, zero, folder, steps, save_at, poison=None, precision=Precision.fp32):
    """Metrics of each step from where `folder` stands."""
    from omni_train import platform
    from omni_train.training.engines import zero as zero_engine

    recipe = recipe_of(zero, precision)
    dtype = params_dtype(precision)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    engine = zero_engine.ZeroEngine(recipe)
    store = engine.open_store(Path(folder))
    store.config = CheckpointConfig(keep=0)
    start = store.latest()
    if start is None:
        engine.initialize(store)
        done = 0
    else:
        done = engine.resume(store, start)["step"]
    out = []
    for step in range(done, steps):
        rows = batches(steps, dtype)[step][rank::world_size]
        if step == poison:
            rows[0].inputs[0, 0] = float("inf")
        result = engine.train_step(rows, 1e-2, step)
        out.append({**result.metrics, "tokens": result.tokens, "updated": result.updated})
        if step + 1 in save_at:
            engine.save(store, step + 1, {"step": step + 1}, None)
    held_out = engine.evaluate(batches(1, dtype)[0][rank::world_size])
    plain = engine.plain_networks()["maker"]
    seen = float(plain.seen)
    averaged = plain(batches(1)[0][0].inputs)
    engine.close()
    platform.parallel.destroy()
    return out, held_out, seen, averaged.tolist()


LAYOUTS = [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2), (2, 3)]


def zero_of(stage: int) -> ZeroConfig:
    return ZeroConfig(stage=stage, whole_below=10)


def test_every_stage_takes_the_steps_of_one_rank_and_resumes_exactly(distributed, tmp_path):
    expected, *others = [
        (name, distributed(world, train, zero_of(stage), tmp_path / name, 5, [3])[0])
        for world, stage in LAYOUTS
        for name in [f"ranks {world} stage {stage}"]
    ]
    steps, held_out, seen, averaged = expected[1]
    assert [one["tokens"] for one in steps] == [14.0] * 5
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert seen == 5.0
    for name, (own, own_held_out, own_seen, own_averaged) in others:
        for mine, theirs in zip(own, steps, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5), name
        assert own_held_out == pytest.approx(held_out, rel=1e-5), name
        assert own_seen == seen
        torch.testing.assert_close(torch.tensor(own_averaged), torch.tensor(averaged), rtol=1e-4, atol=1e-6)
    wanted = load_file(tmp_path / "ranks 1 stage 0" / "step_00000003" / "maker.safetensors")
    for world, stage in LAYOUTS:
        folder = tmp_path / f"ranks {world} stage {stage}"
        files = sorted(path.name for path in (folder / "latest").glob("*.safetensors"))
        assert files == ["judge.safetensors", "judge_ema.safetensors", "maker.safetensors", "maker_ema.safetensors"]
        found = load_file(folder / "latest" / "maker.safetensors")
        assert found.keys() == wanted.keys()
        for key in found:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-5, atol=1e-7)
        (folder / "latest").unlink()  # as in a copy without links
        resumed = distributed(world, train, zero_of(stage), folder, 5, [])[0]
        straight = dict([expected, *others])[f"ranks {world} stage {stage}"]
        assert resumed == (straight[0][3:], *straight[1:])


def change_settings(rank, world_size, stage, folder):
    """Metrics after a checkpoint in the run that wrote it, its settings then changed by hand, and in one resumed with
    them."""
    from omni_train import platform
    from omni_train.training.engines import zero as zero_engine

    recipe = recipe_of(zero_of(stage), Precision.fp32)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    later = replace(recipe.optimizer, betas=[0.8, 0.7], eps=1e-2, weight_decay=0.3, clip_grad=0.2)

    def steps(engine, first, last):
        mine = [rows[rank::world_size] for rows in batches(last)]
        return [engine.train_step(mine[step], 1e-2, step).metrics for step in range(first, last)]

    engine = zero_engine.ZeroEngine(recipe)
    store = engine.open_store(Path(folder))
    engine.initialize(store)
    steps(engine, 0, 2)
    engine.save(store, 2, {}, None)
    engine.recipe = replace(recipe, optimizer=later)
    for one in engine.engines.values():
        one.optimizer.clip_grad = 0.2
        for group in one.optimizer.param_groups:
            group["betas"], group["eps"] = (0.8, 0.7), 1e-2
    on = steps(engine, 2, 5)
    engine.close()
    again = zero_engine.ZeroEngine(replace(recipe, optimizer=later))
    again.resume(store, store.latest())
    resumed = steps(again, 2, 5)
    again.close()
    platform.parallel.destroy()
    return on, resumed


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_changed_moments_and_clipping_take_effect_when_a_run_resumes(distributed, tmp_path, stage):
    for on, resumed in distributed(2, change_settings, stage, tmp_path):
        assert resumed == on


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_like_fp32_and_resumes_exactly(distributed, tmp_path, stage):
    in_fp32, *_ = distributed(2, train, zero_of(stage), tmp_path / "fp32", 5, [])[0]
    straight = distributed(2, train, zero_of(stage), tmp_path / "bf16", 5, [3], None, Precision.bf16)[0]
    for mine, theirs in zip(straight[0], in_fp32, strict=True):
        assert mine["updated"]
        for name in ("loss", "grad_norm", "grad_norm_judge"):
            assert mine[name] == pytest.approx(theirs[name], rel=0.03), name
    resumed = distributed(2, train, zero_of(stage), tmp_path / "bf16", 5, [], None, Precision.bf16)[0]
    assert resumed == (straight[0][3:], *straight[1:])


def test_a_step_that_is_not_finite_changes_nothing(distributed, tmp_path):
    for world, stage in ((1, 0), (2, 1), (2, 3)):
        folder = tmp_path / f"{world} {stage}"
        steps, *_ = distributed(world, train, zero_of(stage), folder, 3, [1, 2], 1)[0]
        assert [one["updated"] for one in steps] == [True, False, True]
        for name in ("maker", "maker_ema", "judge", "judge_ema"):
            before, after = (load_file(folder / f"step_0000000{n}" / f"{name}.safetensors") for n in (1, 2))
            assert all(torch.equal(before[key], after[key]) for key in before), name


class Total(NetworksObjective):
    """The gradient of the weights is the sum of all inputs over the sum of the weights."""

    def weight(self, row: Points) -> float:
        return 1.0

    def tokens(self, row: Points) -> float:
        return 1.0

    def run(self, networks, row, batch) -> Outcome:
        out = networks["model"](row.inputs).float().sum()
        return Outcome({"model": out / batch.weight}, {"loss": (out.detach(), 1.0)})


def add_up(rank, world_size, stage):
    """Gradient norm of one large row and 63 small ones, and of the same with something that is no number."""
    from omni_train import platform
    from omni_train.training.engines import zero as zero_engine

    def build(recipe):
        return {"model": torch.nn.Linear(8, 1, bias=False).to(params_dtype(recipe.precision))}

    network = lone_engine_network("total", lambda networks: Total(), build)
    options = dict(zero=ZeroConfig(stage=stage), precision=Precision.bf16)
    recipe = small_recipe(engine=EngineName.deepspeed, network=network, **options)
    recipe.optimizer.clip_grad = 0.0
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    engine = zero_engine.ZeroEngine(recipe)
    engine.start()
    rows = [Points(torch.full((1, 8), value, dtype=torch.bfloat16), torch.zeros(1)) for value in [256.0] + [0.5] * 63]
    before = engine.states()["model"]["weight"]
    result = engine.train_step(rows[rank::world_size], 1e-2)
    after = engine.states()["model"]["weight"]
    rows[-1].inputs[0, 0] = float("nan")
    poisoned = engine.train_step(rows[rank::world_size], 1e-2)
    last = engine.states()["model"]["weight"]
    engine.close()
    platform.parallel.destroy()
    assert result.updated and not torch.equal(before, after) and after.dtype == torch.float32
    assert not poisoned.updated and torch.equal(after, last)
    return result.metrics["grad_norm"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_in_bf16_add_up_in_fp32(distributed, stage):
    """Half of a bf16 step of 256 is lost 63 times where they are added in bf16."""
    for ranks in (1, 2):
        for norm in distributed(ranks, add_up, stage):
            assert norm == pytest.approx((256 + 63 * 0.5) / 64 * 8**0.5, rel=1e-4)


def recognize(rank, world_size, stage, folder, steps, options):
    """Train a recognizer, whose layers are Megatron's, from where `folder` stands; its tensors before and after."""
    from omni_train import platform
    from omni_train.objectives import recognition
    from omni_train.training.engines import zero as zero_engine

    recipe = recognizer_recipe(engine=EngineName.deepspeed, zero=zero_of(stage), **options)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    with patch.object(recognition, "Tokenizer"), patch.object(recognition, "tag_end", return_value=TAG_END):
        engine = zero_engine.ZeroEngine(recipe)
    store = engine.open_store(Path(folder))
    start = store.latest()
    done = 0
    if start is None:
        engine.initialize(store)
    else:
        done = engine.resume(store, start)["step"]
    before, losses = engine.states()["model"], []
    for step in range(done, steps):
        losses.append(engine.train_step([row_of(utterances(recipe))], 1e-3, step).metrics["loss"])
        engine.save(store, step + 1, {"step": step + 1}, None)
    after = engine.states()["model"]
    engine.close()
    platform.parallel.destroy()
    return before, after, losses


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 3)])
def test_a_recognizer_resumes_and_starts_others(distributed, tmp_path, ranks, stage):
    _, third, losses = distributed(ranks, recognize, stage, tmp_path / "straight", 3, {})[0]
    _, second, _ = distributed(ranks, recognize, stage, tmp_path / "run", 2, {})[0]
    resumed, again, rest = distributed(ranks, recognize, stage, tmp_path / "run", 3, {})[0]
    for found, expected in ((resumed, second), (again, third)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert rest == losses[2:]

    def start(name: str, **options) -> dict:
        return distributed(ranks, recognize, stage, tmp_path / name, 0, {"seed": 5} | options)[0][0]

    source, fresh = str(tmp_path / "run" / "step_00000003"), start("fresh")
    whole = start("whole", init_from=source)
    part = start("part", init_parts={"audio_encoder.*": source})
    for key, tensor in third.items():
        assert torch.equal(whole[key], tensor), key
        assert torch.equal(part[key], tensor if key.startswith("audio_encoder.") else fresh[key]), key
    assert not all(torch.equal(fresh[key], third[key]) for key in third)
    with pytest.raises(
        RankFailed, match=r"has no \S+; 'init_parts=\{ctc_\S*\.\*:random\}' starts what is missing fresh"
    ):
        start("missing", init_from=source, ctc=True)


def test_ctc_learns_alike_where_its_head_is_in_parts(distributed, tmp_path):
    """Its backward pass computes the logits a second time, when ZeRO 3 has put the weight away in between."""
    options = {"ctc": True, "recognition": RecognitionConfig(ctc_weight=0.3)}
    _, whole, losses = distributed(1, recognize, 1, tmp_path / "whole", 2, options)[0]
    before, parts, others = distributed(2, recognize, 3, tmp_path / "parts", 2, options)[0]
    assert others == pytest.approx(losses, rel=1e-5)
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=1e-4, atol=2e-5)
    assert not torch.equal(before["ctc_head.weight"], parts["ctc_head.weight"])


def test_another_number_of_ranks_is_refused_by_name(distributed, tmp_path):
    distributed(2, train, zero_of(1), tmp_path, 1, [1])
    with pytest.raises(RankFailed, match=r"written by 2 ranks with zero.stage=1, not 1 with 1"):
        distributed(1, train, zero_of(1), tmp_path, 2, [])
    assert issubclass(UserError, Exception)


def start_as_on_a_gpu(rank, world_size, stage):
    """Hand the networks to DeepSpeed with the options that a GPU gets."""
    from omni_train import platform
    from omni_train.training.engines import zero as zero_engine

    recipe = recipe_of(zero_of(stage), Precision.fp32)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    engine = zero_engine.ZeroEngine(recipe)
    os.environ["DS_ACCELERATOR"] = "cpu"
    with patch.object(platform, "has_cuda", return_value=True):
        engine.start()
    engine.close()
    platform.parallel.destroy()


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_takes_the_options_of_a_gpu(distributed, stage):
    """It refuses overlapped communication at these stages, and did so on the first GPU that this ran on."""
    distributed(1, start_as_on_a_gpu, stage)
