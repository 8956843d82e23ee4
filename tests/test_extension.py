"""A network, an objective with a frozen model, a kind of row and keys, all defined here: nothing in the package knows
of them, and they train, resume, evaluate and report on both engines."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omni_train.data.rows import kinds
from omni_train.data.rows.base import Row, RowKind
from omni_train.evaluation.base import Evaluated
from omni_train.models.stage import PipelineStage
from omni_train.networks.base import NetworkSpec
from omni_train.objectives.base import GlobalBatch, Objective, Outcome
from omni_train.recipe import networks
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.keys import Change, key
from omni_train.recipe.networks import register
from omni_train.recipe.refusals import divides, refuse
from omni_train.recipe.schema import EngineName
from omni_train.recipe.validate import validate
from tests.support.pool import RankFailed
from tests.support.tiny_runs import write_world

LETTERS = 128


# --- keys ---


@dataclass
class BardConfig:
    """A network that learns which letter comes next."""

    width: int = key(16, ge=1, help="of its hidden states")
    layers: int = key(4, ge=1, help="residual blocks")


@dataclass
class BardSettings:
    """How it learns."""

    pull: float = key(0.5, ge=0, resume=Change.learned, help="weight of the distance to the frozen bard's states")


# --- a kind of row ---


@dataclass
class Lines(Row):
    letters: torch.Tensor  # (T,) int64, 0 behind the last
    padding: torch.Tensor  # (T,) bool


@dataclass
class Line:
    letters: list[int]
    media_bytes: int = 0

    def __len__(self) -> int:
        return len(self.letters)


@dataclass
class Verse:
    """What is asked: the most likely letter after these."""

    letters: torch.Tensor


class LineRows(RowKind):
    """The letters of documents, side by side."""

    name, row = "lines", Lines

    def read(self, sample, parts, reading):
        return [Line([ord(letter) % LETTERS for letter in sample.text[: reading.data.row_tokens]])]

    def row_maker(self, tokenizer, data):
        def make(lines: list[Line]) -> Lines:
            letters = torch.tensor([letter for line in lines for letter in line.letters])
            room = data.row_tokens - len(letters)
            padding = torch.arange(data.row_tokens) >= len(letters)
            return Lines(F.pad(letters, (0, room)), padding, samples=len(lines))

        return make

    def held_out(self, data, model, evaluation, *, split="val", data_rank=0, data_world_size=1, refused=None):
        return [Verse(torch.tensor([ord(letter) for letter in word])) for word in ("kalan", "moper", "risto")][
            data_rank::data_world_size
        ]


# --- a network, for the Megatron engine in parts and for the ZeRO engine whole ---


def stages(recipe) -> dict[str, list]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    bard, parallel = recipe.model.bard, recipe.parallel
    config = TransformerConfig(
        num_layers=bard.layers,
        hidden_size=bard.width,
        num_attention_heads=parallel.tensor,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
    )
    linear = dict(config=config, init_method=config.init_method, skip_bias_add=False)

    class Block(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            self.up = ColumnParallelLinear(bard.width, 2 * bard.width, gather_output=False, **linear)
            self.down = RowParallelLinear(2 * bard.width, bard.width, bias=True, input_is_parallel=True, **linear)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(x)[0]))[0]

    class Stage(PipelineStage, MegatronModule):
        def __init__(self) -> None:
            super().__init__(config)
            rank, each = parallel_state.get_pipeline_model_parallel_rank(), bard.layers // parallel.pipeline
            self.pre_process, self.post_process = rank == 0, rank == parallel.pipeline - 1
            if self.pre_process:
                self.embedding = VocabParallelEmbedding(
                    LETTERS, bard.width, init_method=config.init_method, config=config
                )
            self.mine = [f"block_{rank * each + i}" for i in range(each)]
            for name in self.mine:
                self.add_module(name, Block())
            if self.post_process:
                self.head = ColumnParallelLinear(bard.width, LETTERS, gather_output=True, bias=False, **linear)
            self.received = None

        def set_input_tensor(self, tensor) -> None:
            self.received = tensor[0] if isinstance(tensor, list) else tensor

        def local_row(self, row, step, training):
            return row

        def logits(self, hidden):
            return self.head(hidden)[0][:, 0]

        def forward(self, row, objective=None):
            x = self.embedding(row.letters)[:, None] if self.pre_process else self.received
            for name in self.mine:
                x = getattr(self, name)(x)
            return objective(self, x, row) if self.post_process and objective is not None else x

    return {"model": [Stage()]}


class Whole(torch.nn.Module):
    def __init__(self, bard: BardConfig) -> None:
        super().__init__()
        wide = 2 * bard.width
        self.embedding = torch.nn.Embedding(LETTERS, bard.width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(bard.width, wide), torch.nn.GELU(), torch.nn.Linear(wide, bard.width))
            for _ in range(bard.layers)
        )
        self.head = torch.nn.Linear(bard.width, LETTERS, bias=False)

    def logits(self, hidden):
        return self.head(hidden)

    def forward(self, row):
        x = self.embedding(row.letters)
        for block in self.blocks:
            x = x + block(x)
        return x


def build(recipe, frozen=None):
    return stages(recipe) if recipe.engine is EngineName.megatron else {"model": Whole(recipe.model.bard)}


@dataclass
class FrozenBard:
    modules: list


def frozen(recipe) -> dict[str, FrozenBard]:
    found = build(recipe)["model"]
    modules = found if isinstance(found, list) else [found]
    return {"bard": FrozenBard([module.eval().requires_grad_(False) for module in modules])}


# --- what it learns ---


class Imitation(Objective):
    """The next letter, and the states of a frozen bard. Metrics: ``loss``, ``distance``, ``right``."""

    def __init__(self, bard: FrozenBard, pull: float) -> None:
        self.bard, self.pull, self.prepared = bard, pull, 0

    def weight(self, row: Lines) -> float:
        return float((~row.padding[1:]).sum())

    def prepare(self, engine, rows):
        self.prepared += 1
        found = engine.forward(self.bard.modules, rows, lambda model, hidden, row: {"states": hidden.float()})
        for row, said in zip(rows, found, strict=True):
            row.prepared = said
        return rows

    def __call__(self, model, hidden, row: Lines, batch: GlobalBatch) -> Outcome:
        counts = ~row.padding[1:]
        logits = model.logits(hidden)[:-1][counts].float()
        letters = row.letters[1:][counts]
        cross_entropy = F.cross_entropy(logits, letters, reduction="sum")
        distance = (hidden - row.prepared["states"]).square().mean(-1).flatten()[1:][counts].sum()
        right = (logits.argmax(-1) == letters).sum()
        return Outcome(
            {"model": (cross_entropy + self.pull * distance) / batch.weight},
            {
                "loss": ((cross_entropy / batch.weight).detach(), None),
                "distance": (distance.detach(), len(letters)),
                "right": (right, len(letters)),
            },
        )

    def after_step(self, step):
        return {"prepared": self.prepared}


# --- how it is asked ---


@dataclass
class Rhyme:
    verse: str
    letter: str
    table = "rhymes"

    def line(self) -> str:
        return f"{self.verse} -> {self.letter}"

    def cells(self) -> dict:
        return {"verse": self.verse, "next": self.letter}


class Rhymes:
    def __init__(self, verses: list[Verse]) -> None:
        self.verses = verses

    def __call__(self, network: Whole) -> Evaluated:
        rhymes = []
        for verse in self.verses:
            row = Lines(verse.letters, torch.zeros(len(verse.letters), dtype=torch.bool))
            letter = int(network.logits(network(row))[-1].argmax())
            rhymes.append(Rhyme("".join(map(chr, verse.letters)), chr(letter)))
        return Evaluated({"eval_rhymes": float(len(rhymes))}, rhymes)


# --- and the spec that says all of it ---


def check(recipe) -> None:
    divides(recipe, recipe.parallel.pipeline, "parallel.pipeline", "model.bard.layers")
    if recipe.evaluation.every and recipe.parallel.pipeline > 1:
        refuse(recipe, "evaluation.every", "a bard in parts does not rhyme; set 0")


BARD = NetworkSpec(
    name="bard",
    engines=(EngineName.megatron, EngineName.deepspeed),
    rows="lines",
    parts=("bard",),
    settings=("bard",),
    keys={"model.bard": BardConfig, "bard": BardSettings},
    check=check,
    frozen=frozen,
    build=build,
    objective=lambda recipe, networks, frozen: Imitation(frozen["bard"], recipe.bard.pull),
    evaluation=lambda recipe, verses, refused, frozen: Rhymes(verses),
)


@contextlib.contextmanager
def known():
    """In this process, for a while: other tests count what the package brings."""
    register(BARD)
    kinds.register(LineRows())
    try:
        yield
    finally:
        del networks._TABLE["bard"], kinds._KINDS["lines"]


# --- tests ---


@pytest.fixture(autouse=True)
def registered():
    with known():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    (folder / "recipes" / "model").mkdir(parents=True)
    (folder / "recipes" / "model" / "bard.yaml").write_text("name: bard\nvocab_size: 320\nbard:\n  width: 24\n")
    return folder


def recipe_of(world: Path, *more: str):
    return load_recipe(words(world, *more), config_dir=world / "recipes")


MEGATRON = ["engine=megatron", "parallel.tensor=2", "parallel.pipeline=2"]
ZERO = ["engine=deepspeed", "zero.stage=1", "evaluation.every=2"]


def words(world: Path, *more: str) -> list[str]:
    return [
        "network=bard",
        "model=bard",
        "data=shards",
        "data.rows=lines",
        f"data.path={world}/text",
        f"data.tokenizer={world}/tokenizer",
        "data.row_tokens=256",
        "data.alignment=1",
        "data.streams=2",
        "data.workers=0",
        "precision=fp32",
        "schedule.steps=4",
        "schedule.global_batch=4",
        "schedule.eval_every=2",
        "schedule.eval_rows=2",
        "checkpoint.save_every=2",
        *more,
    ]


def train(rank, world_size, world, overrides):
    """A run on this rank of the pool; its logged steps, and what it said."""
    from omni_train import platform
    from omni_train.training.trainer import Trainer

    said = io.StringIO()
    with contextlib.redirect_stderr(said), known():
        recipe = recipe_of(world, *overrides)
        validate(recipe, world_size)
        platform.parallel.initialize(recipe.parallel, recipe.seed)
        trainer = Trainer(recipe)
        trainer.fit()
        platform.parallel.destroy()
    lines = (Path(recipe.runs_dir, recipe.run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], said.getvalue()


TOLD = ("loss", "grad_norm", "distance", "right", "eval_loss", "eval_distance", "eval_right")


def told(steps: list[dict]) -> list[dict]:
    return [{name: step[name] for name in TOLD if name in step} for step in steps]


@pytest.mark.parametrize(("ranks", "engine"), [(4, MEGATRON), (2, ZERO)], ids=["TP2·PP2", "ZeRO"])
def test_it_trains_resumes_evaluates_and_reports(distributed, world, tmp_path, ranks, engine):
    from rich.console import Console

    from omni_train.tracking.report import report

    overrides = [*engine, f"runs_dir={tmp_path}"]
    straight, said = distributed(ranks, train, world, [*overrides, "run=straight"])[0]
    assert [step["prepared"] for step in straight] == [1, 2, 4, 5]  # once more for the held-out rows after step 2
    assert straight[-1]["loss"] < straight[0]["loss"]
    assert straight[-1]["eval_distance"] > 0 and 0 <= straight[-1]["eval_right"] <= 1
    assert "eval_distance" in straight[1] and "eval_distance" not in straight[0]

    distributed(ranks, train, world, [*overrides, "run=stopped", "schedule.stop_after=2"])
    # The frozen bard's weights wait in the host's memory now, which changes nothing.
    resumed, again = distributed(ranks, train, world, [*overrides, "run=stopped", "frozen.offload=true"])[0]
    assert "resuming from" in again
    assert told(resumed) == told(straight)

    if "evaluation.every=2" in engine:
        assert straight[1]["eval_rhymes"] == straight[3]["eval_rhymes"] == 2
        assert "kalan -> " in said
    page = io.StringIO()
    report(tmp_path / "straight", Console(file=page, width=160))
    assert f"loss {straight[0]['loss']:.3f} → {straight[3]['loss']:.3f} in 4 steps" in page.getvalue()


def test_one_rank_and_four_learn_the_same(distributed, world, tmp_path):
    """The frozen bard's states too, which go from the last stage to all; fresh weights do not depend on the layout."""
    overrides = ["schedule.steps=0", f"runs_dir={tmp_path}", "engine=megatron"]
    distributed(1, train_only, world, [*overrides, "run=start"])
    found = []
    for ranks, layout in ((1, []), (4, MEGATRON)):
        start = [f"init_from={tmp_path}/start", "schedule.steps=3", "bard.pull=0.0", f"run={ranks}"]
        steps, _ = distributed(ranks, train, world, [f"runs_dir={tmp_path}", *layout, *start])[0]
        found.append([(step["loss"], step["grad_norm"], step["right"]) for step in steps])
    for alone, shared in zip(*found, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)


def train_only(rank, world_size, world, overrides):
    """A run without a logged step."""
    from omni_train import platform
    from omni_train.training.trainer import Trainer

    with known():
        recipe = recipe_of(world, *overrides)
        platform.parallel.initialize(recipe.parallel, recipe.seed)
        Trainer(recipe).fit()
        platform.parallel.destroy()


def test_its_keys_are_bounded_and_its_checks_asked(world):
    with pytest.raises(Exception, match=r"^model\.bard\.width=0: must be at least 1"):
        validate(recipe_of(world, "model.bard.width=0", "engine=megatron"), None)
    with pytest.raises(Exception, match=r"^bard\.pull=-1\.0: must be at least 0"):
        validate(recipe_of(world, "bard.pull=-1", "engine=megatron"), None)
    with pytest.raises(Exception, match=r"^model\.bard\.layers=4: not a multiple of parallel\.pipeline=3"):
        validate(recipe_of(world, "parallel.pipeline=3", "engine=megatron"), None)
    with pytest.raises(Exception, match="does not rhyme"):
        validate(recipe_of(world, *MEGATRON, "evaluation.every=1"), None)


def test_metrics_that_change_from_row_to_row_are_refused(distributed, world, tmp_path):
    with pytest.raises(RankFailed, match="rows name different metrics"):
        distributed(1, fickle, world, ["engine=deepspeed", f"runs_dir={tmp_path}", "run=fickle"])


def test_rows_that_prepare_loses_are_missed(distributed, world, tmp_path):
    with pytest.raises(RankFailed, match=r"Imitation\.prepare returned 1 rows of 2; it must return each"):
        distributed(1, forgetful, world, ["engine=deepspeed", f"runs_dir={tmp_path}", "schedule.global_batch=2"])


def forgetful(rank, world_size, world, overrides):
    from unittest.mock import patch

    with patch.object(Imitation, "prepare", lambda self, engine, rows: rows[:1]):
        train(rank, world_size, world, overrides)


def fickle(rank, world_size, world, overrides):
    from unittest.mock import patch

    call, count = Imitation.__call__, []

    def sometimes(self, *given):
        outcome = call(self, *given)
        count.append(1)
        return Outcome(outcome.losses, outcome.metrics | ({"odd": (1.0, 1.0)} if len(count) % 2 else {}))

    with patch.object(Imitation, "__call__", sometimes):
        train(rank, world_size, world, overrides)
