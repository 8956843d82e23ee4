"""Shards of spoken answers with codes, and recipes of small Talkers that read them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.recipe.schema import (
    Context,
    DataConfig,
    MediaConfig,
    ParallelConfig,
    Recipe,
    SourceConfig,
    SpeechConfig,
    SpeechScheduleConfig,
    States,
)
from tests.support.media import image_file, sound_file, tone
from tests.support.talker import CODEBOOKS, CODEWORDS, small_talker
from tests.support.tiny_runs import WORDS

SPOKEN_VOCAB = 320
CODEC = "c0dec" * 12 + "c0de"
"""Content hash of the codec that the codes are said to be of."""
FRAME = 1920


def spoken_recipe(
    data: Path, parallel: ParallelConfig | None = None, states: States = States.live, **changes
) -> Recipe:
    """A recipe of a small Talker on the shards of :func:`write_spoken`."""
    speech = SpeechConfig(
        row_tokens=192,
        states=states,
        context=changes.pop("context", Context.all),
        max_media_positions=changes.pop("max_media_positions", 3),
        schedules=[SpeechScheduleConfig()],
    )
    recipe = small_talker(parallel, vocab_size=SPOKEN_VOCAB, **changes)
    recipe.data = DataConfig(
        name="spoken",
        path=str(data),
        sources=[SourceConfig(str(data / "talk")), SourceConfig(str(data / "read"), weight=0.4)],
        tokenizer=str(data / "tokenizer"),
        rows="speech",
        row_tokens=256,
        alignment=8,
        codec=CODEC,
        speech=speech,
        media=MediaConfig(image_min_pixels=128, image_max_pixels=1024, audio_timestamp_seconds=[]),
        streams=2,
        workers=0,
        shuffle_buffer=4,
        packing_buffer=1,
    )
    return recipe


def write_spoken(folder: Path) -> None:
    """Write sources ``talk``, spoken answers to what is heard, seen and read, and ``read``, and a ``tokenizer``."""
    generator = random.Random(17)
    train([" ".join(generator.choices(WORDS, k=30)) for _ in range(60)], folder / "tokenizer", SPOKEN_VOCAB)
    talk = [_chat(n, generator) for n in range(17)]
    talk.insert(3, ("silent", {"messages": talk[0][1]["messages"]}, {"0.wav": talk[0][2]["0.wav"]}))
    talk.insert(8, ("damaged", talk[1][1], talk[1][2] | {"0.wav": b"RIFF what?"}))
    read = [_spoken(f"read-{n}", {"text": _words(generator, 2 + n)}, {}, 5 + 2 * n, generator) for n in range(6)]
    for source, samples in {"talk": talk, "read": read}.items():
        write_shards(folder / source, "train", samples[:-2], 3 if source == "talk" else 1)
        write_shards(folder / source, "val", samples[-2:], 1)
        index_shards(folder / source)
        shards = sorted(file.name for file in (folder / source).glob("*.tar"))
        record = {"codec": CODEC, "shards": dict.fromkeys(shards, CODEC)}
        (folder / source / "codec.json").write_text(json.dumps(record))


def _words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def _chat(n: int, generator: random.Random) -> tuple:
    files = {"0.wav": sound_file(tone(0.3 + 0.07 * n, hertz=200 + 30 * n), format="WAV")}
    parts = [{"type": "audio", "audio": "0.wav"}, {"type": "text", "text": _words(generator, 1 + n % 4)}]
    if n % 3 == 1:
        pixels = np.random.default_rng(n).integers(0, 256, (14 + 3 * n, 40 - n, 3), dtype=np.uint8)
        files["1.png"] = image_file(pixels)
        parts.insert(n % 2, {"type": "image", "image": "1.png"})
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": _words(generator, 2 + n % 5)}]
    if n % 4 == 2:
        turns = [{"role": "system", "content": "briefly"}, *turns, {"role": "user", "content": "again"}, turns[1]]
    return _spoken(f"talk-{n:02d}", {"messages": turns}, files, 6 + n, generator)


def _spoken(key: str, fields: dict, files: dict, frames: int, generator: random.Random) -> tuple:
    codes = np.random.default_rng(generator.randrange(1 << 30)).integers(0, CODEWORDS, (CODEBOOKS, frames))
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.uint16))
    speech = sound_file(tone(frames * FRAME / 24000, 24000), 24000, "WAV")
    voice = {"name": generator.choice(["anna", "ben"]), "description": _words(generator, 2)}
    fields = fields | {"speech": "s.wav", "voice": voice}
    return key, fields, files | {"s.wav": speech, "codes.npy": buffer.getvalue()}


def stored(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with states that ``omni-train data states`` wrote to `out`."""
    sources = [replace(source, path=str(out / Path(source.path).name)) for source in recipe.data.sources]
    speech = replace(recipe.data.speech, states=States.stored)
    return replace(recipe, data=replace(recipe.data, sources=sources, speech=speech))
