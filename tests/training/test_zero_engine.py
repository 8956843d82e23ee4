"""The ZeRO engine: every stage and number of ranks takes the same steps, goes on exactly, and leaves plain files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omni_train.errors import UserError
from omni_train.objectives.task import Outcome, Task
from omni_train.recipe.schema import CheckpointConfig, EngineName, ParamGroupConfig, ZeroConfig
from tests.support.pool import RankFailed
from tests.support.thinker import small_recipe


@dataclass
class Points:
    inputs: torch.Tensor  # (B, 13)
    wanted: torch.Tensor  # (B, 5)
    samples: int = 1
    skipped: dict[str, int] = field(default_factory=dict)


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


class Duel(Task):
    """A maker is drawn to what is wanted and to what a judge takes for it; the judge learns to tell them apart."""

    def __init__(self, recipe) -> None:
        torch.manual_seed(recipe.seed + torch.distributed.get_rank())  # the engine must make the ranks equal
        self.networks = {"maker": Maker(), "judge": Judge()}

    def weight(self, row: Points) -> float:
        return float(len(row.inputs))

    def tokens(self, row: Points) -> float:
        return float(len(row.inputs))

    def run(self, networks, row, total_weight, step, training) -> Outcome:
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
        figures = {"loss": (far.detach() * total_weight, count), "told": (told.detach() * total_weight, count)}
        return Outcome({"maker": loss, "judge": told}, figures)

    def after_step(self, networks, step):
        networks["maker"].seen += 1
        return {}


def recipe_of(zero: ZeroConfig):
    recipe = small_recipe(engine=EngineName.deepspeed)
    recipe.zero = zero
    recipe.trainable = ["maker.layers.*", "judge.*"]
    recipe.optimizer.groups = [ParamGroupConfig(match="judge.*", lr_factor=0.5)]
    recipe.optimizer.ema_decay = 0.7
    recipe.optimizer.clip_grad = 0.4  # every step is clipped
    return recipe


def batches(steps: int) -> list[list[Points]]:
    """Four rows of 2 to 5 points a step."""
    draw = torch.Generator().manual_seed(31)
    return [
        [Points(torch.randn(size, 13, generator=draw), torch.randn(size, 5, generator=draw)) for size in (3, 5, 2, 4)]
        for _ in range(steps)
    ]


def train(rank, world_size, zero, folder, steps, save_at, poison=None):
    """Metrics of each step from where `folder` stands."""
    from omni_train import platform
    from omni_train.training import zero_engine

    recipe = recipe_of(zero)
    platform.parallel.initialize(recipe.parallel, recipe.seed)
    zero_engine.build_task = Duel
    zero_engine.build_networks = lambda recipe, teacher: Duel(recipe).networks
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
        rows = batches(steps)[step][rank::world_size]
        if step == poison:
            rows[0].inputs[0, 0] = float("inf")
        result = engine.train_step(rows, 1e-2, step)
        out.append({**result.metrics, "tokens": result.tokens, "updated": result.updated})
        if step + 1 in save_at:
            engine.save(store, step + 1, {"step": step + 1}, None)
    held_out = engine.evaluate(batches(1)[0][rank::world_size])
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
        resumed = distributed(world, train, zero_of(stage), folder, 5, [])[0]
        straight = dict([expected, *others])[f"ranks {world} stage {stage}"]
        assert resumed == (straight[0][3:], *straight[1:])


def test_a_step_that_is_not_finite_changes_nothing(distributed, tmp_path):
    for world, stage in ((1, 0), (2, 1), (2, 3)):
        folder = tmp_path / f"{world} {stage}"
        steps, *_ = distributed(world, train, zero_of(stage), folder, 3, [1, 2], 1)[0]
        assert [one["updated"] for one in steps] == [True, False, True]
        before, after = (load_file(folder / f"step_0000000{n}" / "maker.safetensors") for n in (1, 2))
        assert all(torch.equal(before[key], after[key]) for key in before if key != "seen")


def test_another_number_of_ranks_is_refused_by_name(distributed, tmp_path):
    distributed(2, train, zero_of(1), tmp_path, 1, [1])
    with pytest.raises(RankFailed, match=r"written by 2 ranks with zero.stage=1, not 1 with 1"):
        distributed(1, train, zero_of(1), tmp_path, 2, [])
    assert issubclass(UserError, Exception)
