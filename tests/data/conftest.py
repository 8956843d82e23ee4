"""A small set of shards with a tokenizer: uneven documents, some longer than a row, and short chats."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data_pipelines.rehearsal.tokenizer import train
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.recipe.schema import AudioEncoderConfig, DataConfig, ModelConfig, SourceConfig, VisionEncoderConfig

ROW = 192
MODEL = ModelConfig(
    name="hears and sees",
    audio=AudioEncoderConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8),
    vision=VisionEncoderConfig(hidden_size=8, depth=1, num_heads=1, intermediate_size=8),
)
WORDS = [a + b for a in ("ka", "mo", "ri", "te", "zu") for b in ("lan", "per", "sto", "vin", "qua", "del")]


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def documents(count: int, seed: int) -> list[tuple[str, dict]]:
    """Keys and fields; the number of the document begins its text, so that a row tells which samples it holds."""
    generator = random.Random(seed)
    return [
        (f"text-{n:05d}", {"text": f"{n}: {sentence(generator, int(generator.paretovariate(0.9) * 9) % 500)}"})
        for n in range(count)
    ]


def chats(count: int, seed: int) -> list[tuple[str, dict]]:
    generator = random.Random(seed)
    turns = [("user", 5), ("assistant", 17)]
    return [
        (
            f"chat-{n:05d}",
            {"messages": [{"role": role, "content": f"{n} {sentence(generator, words)}"} for role, words in turns]},
        )
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    texts = [fields["text"] for _, fields in documents(60, seed=5)]
    train([*texts, *["x\n\n\ny"] * 500], folder, vocab_size=320)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(tokenizer_folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(samples, shards=3) makes an indexed folder of shards of its own, all of them in the train split."""

    def make(samples: list[tuple[str, dict]], shards: int = 3, name: str = "shards") -> Path:
        write_shards(tmp_path / name, "train", samples, shards)
        index_shards(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of documents and of chats, with train and val splits."""
    root = tmp_path_factory.mktemp("sources")
    for name, samples in (("text", documents(390, seed=7)), ("chat", chats(130, seed=11))):
        write_shards(root / name, "train", samples[40:], 5)
        write_shards(root / name, "val", samples[:40], 1)
        index_shards(root / name)
    return [root / "text", root / "chat"]


@pytest.fixture
def config(sources: list[Path], tokenizer_folder: Path) -> DataConfig:
    return DataConfig(
        name="small",
        path="unused",
        sources=[SourceConfig(str(sources[0]), 0.8), SourceConfig(str(sources[1]), 0.2)],
        tokenizer=str(tokenizer_folder),
        row_tokens=ROW,
        alignment=16,
        streams=4,
        workers=0,
        shuffle_buffer=23,
        packing_buffer=9,
    )
