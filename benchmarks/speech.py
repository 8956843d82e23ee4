"""Speed of the codec against ``transformers``' MimiModel and Code2Wav at the released sizes, and of AuT training.

Both sides are in this process, in fp32 with random weights, which cost what trained ones do. They take turns, so that a
busy machine slows both. AuT trains at the size of the rehearsal, on the rehearsal's speech, on one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from omni_train.data_pipelines.rehearsal import build
from omni_train.models.code2wav import Code2Wav
from omni_train.models.codec import SpeechCodec
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import Code2WavConfig, CodecConfig

SECONDS = 8  # of speech
RATE, FRAMES = 24000, 100  # samples a second, and frames in those seconds
REPEATS = 9
STEPS = 12  # of AuT, the first two not counted
FRAMES_PER_HOUR = 360_000  # mel frames


def run() -> list[dict]:
    """Rows of name, value and unit."""
    torch.manual_seed(11)
    return [*_codec(), *_recognizer()]


@torch.no_grad()
def _codec() -> list[dict]:
    from transformers import MimiConfig, MimiModel
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeCode2WavConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeCode2Wav

    codec = SpeechCodec(CodecConfig(), None).eval()
    codec.quantizer(codec.encoder(torch.randn(2, RATE)), None)
    for part in (codec.quantizer.semantic, codec.quantizer.acoustic):
        part.codebooks.initialized.fill_(1)
    mimi = MimiModel(MimiConfig()).eval()
    code2wav = Code2Wav(Code2WavConfig()).eval()
    reference = Qwen3OmniMoeCode2Wav(Qwen3OmniMoeCode2WavConfig()).eval()
    waveform, codes = torch.randn(1, SECONDS * RATE) * 0.1, torch.randint(0, 2048, (1, 16, FRAMES))
    pairs = {
        "codec encode": (lambda: codec.encode(waveform), lambda: mimi.encode(waveform[None], num_quantizers=16)),
        "codec decode": (lambda: code2wav(codes), lambda: reference(codes)),
    }
    rows = []
    for name, sides in pairs.items():
        ours, theirs = _take_turns(sides)
        rows += [
            {"name": f"{name}, {SECONDS} s, transformers", "value": SECONDS / theirs, "unit": "× real time"},
            {"name": f"{name}, {SECONDS} s, omni_train", "value": SECONDS / ours, "unit": "× real time"},
            {"name": f"{name}, ratio", "value": theirs / ours, "unit": "×"},
        ]
    return rows


def _take_turns(sides: tuple[Callable, ...]) -> list[float]:
    """Median seconds of each side, which take turns."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(1 + REPEATS):  # the first warms up
        for measured, side in zip(seconds, sides, strict=True):
            start = time.perf_counter()
            side()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured[1:]) for measured in seconds]


def _recognizer() -> list[dict]:
    from omni_train import platform
    from omni_train.training.engines.zero import ZeroEngine
    from omni_train.training.feed import Feed

    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        build(world, samples=0.1)
        words = ["stage=audio_encoder", "model=tiny", "precision=fp32", "data=rehearsal_transcripts"]
        words += [f"data.path={world}", "data.workers=1", "data.streams=2", "schedule=smoke", "optimizer.lr=1e-3"]
        recipe = load_recipe([*words, "recognition.ctc_weight=0.5"])
        platform.init_distributed()
        platform.parallel.initialize(recipe.parallel, recipe.seed)
        engine, feed = ZeroEngine(recipe), Feed(recipe)
        engine.start()
        hours, seconds = [], []
        try:
            for step in range(STEPS):
                start = time.perf_counter()
                rows = feed.rows(2)
                engine.train_step(rows, 1e-3, step)
                seconds.append(time.perf_counter() - start)
                hours.append(sum(len(row.mel) for row in rows) / FRAMES_PER_HOUR)
        finally:
            feed.close()
            engine.close()
            platform.parallel.destroy()
            platform.leave_distributed()
    rate = sum(hours[2:]) / (sum(seconds[2:]) / 3600)
    return [{"name": "AuT training, 1.3 M parameters, audio heard", "value": rate, "unit": "hours an hour"}]
