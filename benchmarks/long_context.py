"""Speed and memory of a step of S3 on long rows: the tiny Thinker on two context ranks, all trained and recomputed.

A row is 9 % sound in one clip (an hour of it in 262,144 tokens), some pictures, and texts of at most 16,384 tokens.
Each length has processes of its own, so that the peak of memory is its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from pathlib import Path

import numpy as np
import torch

from omni_train import platform
from omni_train.data.rows.batch import IGNORE, MODALITIES, PackedBatch
from omni_train.data.rows.packing import pack
from omni_train.data.rows.sequences import TokenSequence
from omni_train.data.samples.lengths import audio_tokens, vision_tokens
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import Recipe
from omni_train.threads import keep_awake

LENGTHS = (8192, 32768, 131072, 262144)
RANKS = 2
SOUND_FRAMES = 360_000 / 262_144  # mel frames for each token of the row
TEXT_TOKENS = 16384
PICTURES = [(1, 24, 32)] * 3


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


def _ids(draw: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    return draw.integers(1, vocabulary, count, dtype=np.int32)


def peak_gigabytes() -> float:
    """Peak memory of this process, in GiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def step(rank: int, tokens: int, port: int, results: multiprocessing.Queue) -> None:
    """Run a process that takes one step and reports seconds and peak memory."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    platform.setup()
    platform.init_distributed(timeout_seconds=1800)
    from omni_train.training.engines.megatron import MegatronEngine

    settings = recipe(tokens)
    platform.parallel.initialize(settings.parallel, settings.seed)
    engine, batch = MegatronEngine(settings), row(settings)
    start = time.perf_counter()
    result = engine.train_step([batch], 1e-4)
    seconds = time.perf_counter() - start
    if not result.updated:
        raise RuntimeError(f"the step on {tokens} tokens gave {result.metrics}")
    results.put((seconds, peak_gigabytes()))
    platform.parallel.destroy()
    torch.distributed.destroy_process_group()


def run(lengths: tuple[int, ...] = LENGTHS) -> list[dict]:
    """Rows of name, value and unit."""
    keep_awake()
    rows = []
    for tokens in lengths:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        processes = [context.Process(target=step, args=(rank, tokens, port, results)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"the step on {tokens} tokens failed")
        seconds, memory = (max(values) for values in zip(*(results.get() for _ in processes), strict=True))
        name = f"S3 step, {tokens:,} tokens"
        rows += [
            {"name": f"{name}, {tokens * SOUND_FRAMES / 6000:.0f} min of sound", "value": seconds, "unit": "s"},
            {"name": f"{name}, time", "value": seconds / tokens * 1e3, "unit": "ms/token"},
            {"name": f"{name}, peak of a process", "value": memory, "unit": "GiB"},
            {"name": f"{name}, memory", "value": memory / tokens * 2**20, "unit": "KiB/token"},
        ]
    return rows
