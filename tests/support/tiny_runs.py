"""A small world of shards, and the words of the command line that train tiny networks on it."""

from __future__ import annotations

import random
from pathlib import Path

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import index_shards, write_shards
from tests.support.media import sound_file, tone

WORDS = [a + b for a in ("ka", "mo", "ri", "te", "zu") for b in ("lan", "per", "sto", "vin", "qua", "del")]


def write_world(folder: Path) -> None:
    """Write shards ``text`` and a ``tokenizer`` into a folder."""
    generator = random.Random(11)
    texts = [" ".join(generator.choices(WORDS, k=int(generator.paretovariate(0.9) * 9) % 300 + 1)) for _ in range(400)]
    train(texts, folder / "tokenizer", vocab_size=320)
    samples = [(f"text-{n:05d}", {"text": text}) for n, text in enumerate(texts)]
    write_shards(folder / "text", "train", samples[:350], shards=3)
    write_shards(folder / "text", "val", samples[350:], shards=1)
    index_shards(folder / "text")


def write_speech(folder: Path) -> None:
    """Write shards ``speech``, tones with transcripts, into a folder."""
    for split, count in (("train", 24), ("val", 60)):
        samples = []
        for n in range(count):
            question = {"role": "user", "content": [{"type": "audio", "audio": "0.flac"}]}
            answer = {"role": "assistant", "content": " ".join(WORDS[n % 7 : n % 7 + 3])}
            fields = {"messages": [question, answer], "meta": {"task": "transcribe", "language": "en"}}
            sound = sound_file(tone(0.3 + n / 40, hertz=150 + 40 * n))
            samples.append((f"{split}-{n:03d}", fields, {"0.flac": sound}))
        write_shards(folder / "speech", split, samples, shards=1)
    index_shards(folder / "speech")


def thinker(world: Path, *, encoders: bool = False) -> list[str]:
    """Words that train a tiny Thinker on the world's text; one that hears and sees takes longer to start."""
    return [
        "stage=text_pretrain",
        "model=tiny",
        "model.vocab_size=320",
        "model.thinker.repeats=1",
        "model.thinker.hidden_size=64",
        *([] if encoders else ["model.audio=null", "model.vision=null"]),
        "data=shards",
        f"data.path={world}/text",
        f"data.tokenizer={world}/tokenizer",
        "data.row_tokens=256",
        "data.streams=2",
        "data.workers=1",
        "data.shuffle_buffer=20",
        "data.packing_buffer=8",
        "schedule.global_batch=2",
    ]


def recognizer(world: Path) -> list[str]:
    """Words that train a tiny recognizer, on ZeRO, on the world's speech."""
    return [
        "stage=audio_encoder",
        "model=tiny",
        "model.vocab_size=320",
        "data=rehearsal_transcripts",
        f"data.path={world}",
        f"data.tokenizer={world}/tokenizer",
        "data.row_tokens=256",
        "data.streams=2",
        "data.workers=1",
        "data.shuffle_buffer=8",
        "data.packing_buffer=4",
        "precision=fp32",
        "schedule=smoke",
        "schedule.global_batch=2",
    ]
