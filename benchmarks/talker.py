"""Speed of a training step of the Talker: forward, backward and AdamW, against plain torch over ``transformers``.

Both sides have the same dense Talker, its code predictor and weights, in fp32, and text and speech summed at every
position. The reference pads batches of 2, and runs the predictor on every frame: by a pass for each codebook over all
before it, without a cache (*sequential*), or by one pass (*parallel*), as the script of Qwen3-TTS does. Ours packs, and
runs it on all frames or on a random eighth. Only frames of speech count.

The split of a step among Thinker, Talker and predictor is measured above a frozen Thinker of twice the Talker's width
and as many layers, which reads a question of 128 tokens before each answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.sides import processes, take_turns
from benchmarks.talker_reference import CODEBOOKS, WORDS, Reference, layer_sizes, padded
from omni_train import platform
from omni_train.data.rows.batch import IGNORE, SpeechRow
from omni_train.data.rows.packing import aligned
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import SpeechSequence
from omni_train.data.rows.speech_packing import pack_speech
from omni_train.data.rows.speech_plans import SPEECH, Plan
from omni_train.recipe.schema import (
    CheckpointConfig,
    CodePredictorConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    Recipe,
    ScheduleConfig,
    SpeechConfig,
    States,
    TalkerConfig,
    TalkerStyle,
    TextEmbedding,
    ThinkerConfig,
)
from omni_train.threads import keep_awake

PADDED_BATCH, ALIGNMENT = 2, 16
HEAD, QUESTION, READ = 9, 128, 32
"""Positions before the first frame; tokens of a question; those of them whose states are read."""
FRACTIONS = {"no frames": 1e-9, "a random eighth": 1 / 8, "all frames": 1.0}
LEARNING_RATE = 0.0
"""It leaves the weights as they are, so that every step of a side has the same loss."""


@dataclass(frozen=True)
class Size:
    """Size of a Talker, and of the samples that it learns."""

    hidden: int
    layers: int
    codebook: int
    samples: int
    frames: tuple[int, int]  # least and most
    repeats: int


SIZES = (
    Size(hidden=128, layers=2, codebook=256, samples=8, frames=(8, 64), repeats=3),
    Size(hidden=512, layers=8, codebook=2048, samples=4, frames=(8, 48), repeats=3),
)


def utterances(size: Size) -> list[Plan]:
    """Random samples of text and speech."""
    generator, plans = np.random.default_rng(5), []
    for frames in generator.integers(size.frames[0], size.frames[1] + 1, size.samples).tolist():
        plan = Plan.blank(HEAD + frames, CODEBOOKS, SPEECH)
        plan.text_ids[:] = generator.integers(WORDS, size=len(plan))
        plan.codes[HEAD:] = generator.integers(size.codebook, size=(frames, CODEBOOKS))
        plan.labels[HEAD - 1 :] = [*plan.codes[HEAD:, 0], size.codebook]  # EOS is the first behind the codewords
        plan.label_codes[HEAD - 1 : -1] = plan.codes[HEAD:, 1:]
        plan.text_ended[:] = True
        plans.append(plan)
    return plans


def row_tokens(size: Size) -> int:
    """Length of the one row that holds all samples: of many, packing leaves hardly any of a row empty."""
    return sum(aligned(len(plan), ALIGNMENT) for plan in utterances(size))


def packed(size: Size, live: bool) -> SpeechRow:
    """All samples in one row, with a question before each where the Thinker runs."""
    generator, sequences = np.random.default_rng(7), []
    for plan in utterances(size):
        question, read = None, np.zeros(0, np.int64)
        if live:
            tokens = generator.integers(WORDS, size=QUESTION)
            question, read = TokenSequence(tokens, np.full_like(tokens, IGNORE)), np.arange(READ)
            plan.sources[: HEAD - 1] = np.arange(HEAD - 1)
        sequences.append(SpeechSequence(plan, None, generator.random(len(plan), np.float32), question, read))
    return pack_speech(
        sequences,
        row_tokens=QUESTION * len(sequences) if live else 0,
        speech_row_tokens=row_tokens(size),
        alignment=ALIGNMENT,
        padding_token=0,
    )


def recipe(size: Size, thinker: Path | None = None) -> Recipe:
    """Recipe of our side; `thinker` is where the checkpoint of the Thinker is."""
    same = dict(
        pattern="*-", repeats=size.layers, partial_rotary_factor=1.0, rope_theta=1e6, mrope_section=[22, 21, 21]
    )
    same |= dict(attention_output_gate=False, zero_centered_norm=False)
    controls = ("eos", "pad", "bos", "text", "nothink", "think_bos", "think_eos")
    talker = TalkerConfig(
        **same,
        **layer_sizes(size.hidden),
        style=TalkerStyle.dual_track,
        thinker_hidden_size=2 * size.hidden,
        accept_hidden_layer=size.layers,
        projection_intermediate_size=2 * size.hidden,
        text_embedding=TextEmbedding.own,
        num_code_groups=CODEBOOKS,
        codebook_size=size.codebook,
        codec_vocab_size=2 * size.codebook,
        **{f"codec_{name}_id": size.codebook + index for index, name in enumerate(controls)},
        code_predictor=CodePredictorConfig(**layer_sizes(size.hidden), num_hidden_layers=5),
    )
    below = ThinkerConfig(**same, **layer_sizes(2 * size.hidden)) if thinker else None
    result = Recipe(
        stage="bench",
        run="bench",
        network="talker",
        precision=Precision.fp32,
        model=ModelConfig(name="bench", vocab_size=WORDS, thinker=below, talker=talker),
        data=DataConfig(name="bench", path="", tokenizer="", rows="speech", row_tokens=QUESTION * size.samples),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, clip_grad=0.0),
        schedule=ScheduleConfig(steps=1, global_batch=1),
    )
    result.data.speech = SpeechConfig(row_tokens=row_tokens(size), states=States.live if thinker else States.none)
    result.talker_training.thinker = str(thinker) if thinker else None
    return result


def theirs(size: Size, folder: Path) -> Callable[[str], float]:
    """Step of the reference, ``sequential`` or ``parallel`` -> loss."""
    model = Reference(size.hidden, size.layers, size.codebook).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    plans = utterances(size)
    batches, labels = padded(plans, PADDED_BATCH), sum(int((plan.labels != IGNORE).sum()) for plan in plans)

    def step(kind: str) -> float:
        total = 0.0
        for batch in batches:
            loss = model(batch, kind == "sequential") / labels
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def ours(size: Size, folder: Path) -> Callable[[str], float]:
    """Step of our engine on speech alone, one of ``FRACTIONS`` -> loss."""
    platform.init_distributed()
    from omni_train.training.engines.megatron import MegatronEngine

    run = recipe(size)
    platform.parallel.initialize(run.parallel, run.seed)
    engine = MegatronEngine(run)
    weights = Reference(size.hidden, size.layers, size.codebook).tensors()
    with torch.no_grad():
        for name, parameter in engine.network().named_parameters():
            if not name.startswith("hidden_projection."):  # without a Thinker it reads nothing
                parameter.copy_(weights.pop(name))
    assert not weights, f"not of our Talker: {list(weights)}"
    engine.optimizer.reload_model_params()
    return _steps(engine, packed(size, live=False))


def live(size: Size, folder: Path) -> Callable[[str], float]:
    """Step of our engine above a frozen Thinker, or ``thinker`` alone (its loss is 0)."""
    platform.init_distributed()
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks
    from omni_train.training.engines.megatron import MegatronEngine

    run = recipe(size, folder / "thinker")
    platform.parallel.initialize(run.parallel, run.seed)
    store = CheckpointStore(folder / "thinker", CheckpointConfig(asynchronous=False), run.model)
    store.save(0, build_chunks(run), None, {}, None)
    store.close()
    engine = MegatronEngine(run)
    row = packed(size, live=True)
    step = _steps(engine, row)
    return lambda kind: 0.0 * len(engine.prepared([row])) if kind == "thinker" else step(kind)


def _steps(engine, row: SpeechRow) -> Callable[[str], float]:
    def step(kind: str) -> float:
        engine.recipe.talker_training.predictor_fraction = FRACTIONS[kind]
        return engine.train_step([row], LEARNING_RATE).metrics["loss"]

    return step


def run(threads: int = 2) -> list[dict]:
    """Rows of name, value and unit."""
    keep_awake()  # as the command line does; all sides inherit it
    return [row for size in SIZES for row in (*_compare(size, threads), *_split(size, threads))]


def _compare(size: Size, threads: int) -> list[dict]:
    turns = [("reference", "sequential"), ("reference", "parallel")]
    turns += [("omni_train", "all frames"), ("omni_train", "a random eighth")]
    sides = {"reference": functools.partial(theirs, size), "omni_train": functools.partial(ours, size)}
    with processes(sides, threads) as connections:
        seconds, rounds = take_turns(connections, turns, size.repeats)
    for losses in rounds:
        if not all(math.isclose(loss, losses[0], rel_tol=1e-4) for loss in losses[:3]):
            raise RuntimeError(f"the sides do not train the same model: losses {losses} of {turns}")
    frames = sum(len(plan) - HEAD for plan in utterances(size))
    name = f"Talker, hidden {size.hidden}, {size.layers} layers, {frames:,} frames"
    speeds = [(f"{name}, {side}, {kind}", frames / s) for (side, kind), s in zip(turns, seconds, strict=True)]
    rows = [{"name": name, "value": value, "unit": "frames/s"} for name, value in speeds]
    ratios = [
        (f"{name}, ratio, {ours} to {theirs}", seconds[theirs_at] / seconds[ours_at])
        for ours_at, ours in ((2, "all frames"), (3, "a random eighth"))
        for theirs_at, theirs in ((0, "sequential"), (1, "parallel"))
    ]
    return rows + [{"name": name, "value": value, "unit": "×"} for name, value in ratios]


def _split(size: Size, threads: int) -> list[dict]:
    kinds = ["thinker", *FRACTIONS]
    with processes({"live": functools.partial(live, size)}, threads) as connections:
        seconds, _ = take_turns(connections, [("live", kind) for kind in kinds], size.repeats)
    thinker, none, eighth, every = seconds
    name = f"Talker, hidden {size.hidden}, {size.layers} layers, share of"
    rows = []
    for total, kind in ((eighth, "a random eighth"), (every, "all frames")):
        shares = {"Thinker": thinker, "Talker": none - thinker, "predictor": total - none}
        rows += [
            {"name": f"{name} {part}, {kind}", "value": 100 * part_seconds / total, "unit": "%"}
            for part, part_seconds in shares.items()
        ]
    return rows
