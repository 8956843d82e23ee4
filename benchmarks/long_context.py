"""Speed and memory of a step on long rows: tiny models on two context ranks, all trained and recomputed.

A row of S3's Thinker is 9 % sound in one clip (an hour of it in 262,144 tokens), some pictures, and texts of at most
16,384 tokens. Half a row of the Talker's long context is one answer (half an hour of speech in 65,536 positions), the
rest answers of a minute, each behind a question that the frozen Thinker reads. Each length has processes of its own, so
that the peak of memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from omni_train import platform
from omni_train.data.rows.batch import IGNORE, MODALITIES, PackedBatch, SpeechRow
from omni_train.data.rows.packing import aligned, pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.rows.speech import SpeechSequence
from omni_train.data.rows.speech_packing import pack_speech
from omni_train.data.rows.speech_plans import Planner, joined
from omni_train.data.samples.lengths import audio_tokens, vision_tokens
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import CheckpointConfig, Recipe, ScheduleKind, SpeechScheduleConfig
from omni_train.threads import keep_awake

LENGTHS = (8192, 32768, 131072, 262144)
TALKER_LENGTHS = (8192, 65536)
RANKS = 2
SOUND_FRAMES = 360_000 / 262_144  # mel frames for each token of the row
TEXT_TOKENS = 16384
PICTURES = [(1, 24, 32)] * 3
MINUTE = 750  # frames
QUESTION, READ = 128, 32  # tokens before an answer; those of them whose states are read


def recipe(tokens: int) -> Recipe:
    """Recipe of S3, on rows of another length and two processes."""
    overrides = ["stage=s3_long_context", "model=tiny", "precision=fp32", "data=rehearsal", "parallel=single"]
    return load_recipe([*overrides, f"parallel.context={RANKS}", f"data.row_tokens={tokens}"])


def row(settings: Recipe) -> PackedBatch:
    """Row of random tokens, sound and pictures."""
    draw, model, total = np.random.default_rng(7), settings.model, settings.data.row_tokens
    frames = int(total * SOUND_FRAMES)
    heard = np.arange(audio_tokens(frames, model.audio))
    seen = np.arange(sum(vision_tokens(grid, model.vision) for grid in PICTURES)) + len(heard)
    ids = _ids(draw, len(heard) + len(seen) + 40, model.vocab_size)
    labels = np.append(ids[1:], IGNORE)
    labels[: len(heard) + len(seen)] = IGNORE
    patches = sum(t * h * w for t, h, w in PICTURES)
    width = 3 * model.vision.temporal_patch_size * model.vision.patch_size**2
    sequences = [
        TokenSequence(
            ids,
            labels,
            modality=MODALITIES.index("audio"),
            mel=[draw.standard_normal((frames, model.audio.num_mel_bins), dtype=np.float32)],
            audio_slots=heard,
            patches=[draw.integers(0, 256, (patches, width), dtype=np.uint8)],
            grids=PICTURES,
            vision_slots=seen,
        )
    ]
    left = total - -(-len(ids) // settings.data.alignment) * settings.data.alignment
    while left > 0:
        text = _ids(draw, min(TEXT_TOKENS, left), model.vocab_size)
        sequences.append(TokenSequence(text, np.append(text[1:], IGNORE)))
        left -= len(text)
    return pack(sequences, row_tokens=total, alignment=settings.data.alignment, padding_token=0)


def talker_recipe(positions: int, thinker: Path) -> Recipe:
    """Recipe of the Talker's long context, above the Thinker of a checkpoint."""
    overrides = ["stage=talker_long_context", "model=tiny", "precision=fp32", "data=rehearsal_spoken_long"]
    overrides += ["model.talker.text_embedding=own", f"talker_training.thinker={thinker}", "data.codec=unread"]
    overrides += ["parallel=single", f"parallel.context={RANKS}"]
    return load_recipe([*overrides, f"data.row_tokens={positions}", f"data.speech.row_tokens={positions}"])


def talker_row(settings: Recipe) -> SpeechRow:
    """Row of random answers, three frames for each token of text."""
    draw, talker, total = np.random.default_rng(7), settings.model.talker, settings.data.speech.row_tokens
    planner = Planner(talker, SimpleNamespace(im_start=1, im_end=2, encode=lambda text: [3], token_id=lambda name: 4))
    sequences: list[SpeechSequence] = []
    left = total
    while left > 0:
        frames = total * 3 // 8 if not sequences else min(MINUTE, left * 3 // 4 - 64)
        if frames < 1:
            break
        codes = draw.integers(0, talker.codebook_size, (talker.num_code_groups, frames))
        text, lead = _ids(draw, frames // 3, settings.model.vocab_size), SpeechScheduleConfig(ScheduleKind.lead)
        asked = [planner.text(planner.head("user")), planner.states(0, READ), planner.text(planner.tail())]
        plan = joined([*asked, planner.interleaved_head(), planner.interleaved(text.tolist(), codes, lead)])
        tokens = _ids(draw, QUESTION, settings.model.vocab_size)
        question = TokenSequence(tokens, np.full_like(tokens, IGNORE))
        draws = draw.random(len(plan), np.float32)
        sequences.append(SpeechSequence(plan, None, draws, question, np.arange(READ)))
        left -= aligned(len(plan), settings.data.alignment)
    return pack_speech(
        sequences,
        row_tokens=settings.data.row_tokens,
        speech_row_tokens=total,
        alignment=settings.data.alignment,
        padding_token=0,
    )


def _ids(draw: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    return draw.integers(1, vocabulary, count, dtype=np.int32)


def peak_gigabytes() -> float:
    """Peak memory of this process, in GiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def thinker_step(tokens: int, folder: Path) -> tuple[Recipe, PackedBatch]:
    """Recipe and row of S3."""
    settings = recipe(tokens)
    return settings, row(settings)


def talker_step(positions: int, folder: Path) -> tuple[Recipe, SpeechRow]:
    """Recipe and row of the Talker's long context, above a random Thinker."""
    settings = talker_recipe(positions, folder / "thinker")
    return settings, talker_row(settings)


def step(rank: int, made: Callable, tokens: int, folder: Path, port: int, results: multiprocessing.Queue) -> None:
    """Run a process that takes one step and reports seconds and peak memory."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    platform.setup()
    platform.init_distributed(timeout_seconds=1800)
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks
    from omni_train.training.engines.megatron import MegatronEngine

    settings, batch = made(tokens, folder)
    platform.parallel.initialize(settings.parallel, settings.seed)
    if settings.network == "talker":
        store = CheckpointStore(folder / "thinker", CheckpointConfig(asynchronous=False), settings.model)
        store.save(0, build_chunks(settings), None, {}, None)
        store.close()
    engine = MegatronEngine(settings)
    start = time.perf_counter()
    result = engine.train_step([batch], 1e-4)
    seconds = time.perf_counter() - start
    if not result.updated:
        raise RuntimeError(f"the step on {tokens} tokens gave {result.metrics}")
    results.put((seconds, peak_gigabytes()))
    platform.parallel.destroy()
    torch.distributed.destroy_process_group()


def run(lengths: tuple[int, ...] = LENGTHS, talker_lengths: tuple[int, ...] = TALKER_LENGTHS) -> list[dict]:
    """Rows of name, value and unit."""
    keep_awake()
    rows = []
    for tokens in lengths:
        seconds, memory = _measured(thinker_step, tokens)
        name = f"S3 step, {tokens:,} tokens"
        rows.append({"name": f"{name}, {tokens * SOUND_FRAMES / 6000:.0f} min of sound", "value": seconds, "unit": "s"})
        rows += _by_token(name, tokens, seconds, memory)
    for positions in talker_lengths:
        rows += _by_token(
            f"Talker, long context, {positions:,} positions", positions, *_measured(talker_step, positions)
        )
    return rows


def _by_token(name: str, tokens: int, seconds: float, memory: float) -> list[dict]:
    return [
        {"name": f"{name}, time", "value": seconds / tokens * 1e3, "unit": "ms/token"},
        {"name": f"{name}, peak of a process", "value": memory, "unit": "GiB"},
        {"name": f"{name}, memory", "value": memory / tokens * 2**20, "unit": "KiB/token"},
    ]


def _measured(made: Callable, tokens: int) -> tuple[float, float]:
    """Seconds of a step and peak of a process, in GiB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        words = (made, tokens, Path(folder), port, results)
        processes = [context.Process(target=step, args=(rank, *words)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"the step on {tokens} tokens failed")
    seconds, memory = (max(values) for values in zip(*(results.get() for _ in processes), strict=True))
    return seconds, memory
