"""Rows with sound, images and video out of real files: exact, whoever makes them, and without leaks."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from omni_train.data.rows.batch import MODALITIES
from omni_train.data.samples.lengths import audio_tokens, vision_tokens
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.data.stream.states import redistribute
from omni_train.data_pipelines.shards import index_shards, write_shards
from omni_train.recipe.schema import DataConfig, MediaConfig, Positions, SourceConfig
from tests.data.conftest import MODEL, documents
from tests.data.test_loader import assert_same, take, through_a_file, workers_of
from tests.support.media import image_file, sound_file, tone, video_file

SEED = 41


def chat(part: dict, answer: str) -> dict:
    question = {"role": "user", "content": [part, {"type": "text", "text": "kalan?"}]}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def heard(n: int, data: bytes) -> tuple[str, dict, dict]:
    return f"audio-{n:04d}", chat({"type": "audio", "audio": "0.wav"}, f"mo{n}"), {"0.wav": data}


def seen(n: int, data: bytes) -> tuple[str, dict, dict]:
    return f"image-{n:04d}", chat({"type": "image", "image": "0.png"}, f"ri{n}"), {"0.png": data}


def watched(n: int, data: bytes, sound: bool) -> tuple[str, dict, dict]:
    return f"video-{n:04d}", chat({"type": "video", "video": "0.mp4", "sound": sound}, f"te{n}"), {"0.mp4": data}


def sounds(count: int, longest: float = 2.0) -> list[bytes]:
    generator = np.random.default_rng(3)
    return [sound_file(tone(generator.uniform(0.2, longest)), format="WAV") for _ in range(count)]


def images(count: int, largest: int = 120) -> list[bytes]:
    generator = np.random.default_rng(5)
    sizes = generator.integers(33, largest, (count, 2))
    return [image_file(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of sounds, images, videos and documents."""
    root = tmp_path_factory.mktemp("world")
    frames = np.random.default_rng(7).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
    videos = [video_file(frames), video_file(frames[:9], sound=tone(1.1))]
    folders = {
        "audio": [heard(n, data) for n, data in enumerate(sounds(24))],
        "images": [seen(n, data) for n, data in enumerate(images(24))],
        "video": [watched(n, videos[n % 2], sound=n % 2 == 1) for n in range(12)],
        "text": documents(40, seed=9),
    }
    for name, samples in folders.items():
        write_shards(root / name, "train", samples, 3)
        index_shards(root / name)
    return [root / name for name in folders]


@pytest.fixture
def mixed(config: DataConfig, world: list[Path]) -> DataConfig:
    return dataclasses.replace(
        config,
        sources=[SourceConfig(str(folder)) for folder in world],
        row_tokens=256,
        streams=2,
        shuffle_buffer=10,
        media=MediaConfig(image_min_pixels=1024),
    )


def test_every_slot_has_its_token_and_every_medium_its_slots(mixed):
    tokenizer = Tokenizer(mixed.tokenizer)
    pads = {tokenizer.token_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    found = set()
    for row in evaluation_rows(mixed, MODEL, split="train", rows=1000):
        clips = row.mel_cu_seqlens.diff().tolist()
        assert row.mel.shape == (sum(clips), 128)
        assert len(row.audio_slots) == sum(audio_tokens(frames, MODEL.audio) for frames in clips)
        assert len(row.vision_slots) == sum(vision_tokens(grid, MODEL.vision) for grid in row.grid_thw.tolist())
        assert len(row.patches) == row.grid_thw.prod(-1).sum()
        heard = row.tokens == tokenizer.token_id("<|audio_pad|>")
        assert torch.equal(row.audio_slots, heard.nonzero()[:, 0])
        shown = torch.isin(row.tokens, torch.tensor(sorted(pads)))
        assert torch.equal(row.vision_slots, shown.nonzero()[:, 0])
        assert not row.skipped
        found |= {MODALITIES[index] for index in row.modality[~row.padding].tolist()}
    assert found == set(MODALITIES)


def test_rotary_ids_of_every_row_are_floats_as_qwen3_omni_was_released(mixed):
    mixed.media = MediaConfig(positions=Positions.qwen3_omni, video_timestamps=False, image_min_pixels=1024)
    mixed.row_tokens = 128
    rows = evaluation_rows(mixed, MODEL, split="train", rows=1000)
    assert any(not row.modality.any() for row in rows)
    assert {row.position_ids.dtype for row in rows} == {torch.float32}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 2), (2, 0), (2, 1)])
def test_rows_with_media_do_not_depend_on_workers_and_data_ranks(mixed, ranks, workers):
    expected = take(build_loader(mixed, MODEL, seed=SEED), 12)
    other = dataclasses.replace(mixed, workers=workers)
    loaders = [build_loader(other, MODEL, seed=SEED, data_rank=r, data_world_size=ranks) for r in range(ranks)]
    per_rank = [take(loader, 12 // ranks) for loader in loaders]
    assert_same([row for step in zip(*per_rank, strict=True) for row in step], expected)


@pytest.mark.parametrize("taken", [1, 6, 41])
def test_a_loader_restored_mid_pack_goes_on_with_the_same_media(mixed, taken):
    mixed.workers = 1
    loader = build_loader(mixed, MODEL, seed=SEED)
    take(loader, taken)
    state = through_a_file(loader.state_dict())
    expected = take(loader, 9)
    restored = build_loader(dataclasses.replace(mixed, workers=2), MODEL, seed=SEED)
    restored.load_state_dict(redistribute([state], 1)[0])
    assert_same(take(restored, 9), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_media_are_counted_by_reason_and_rows_keep_coming(mixed, write, workers, capfd):
    sound, image, frames = sounds(1)[0], images(1)[0], np.zeros((8, 64, 64, 3), dtype=np.uint8)
    video = video_file(frames)
    bad = [
        heard(0, b""),
        heard(1, sound[:30]),
        heard(2, image),
        seen(3, image[:200]),
        seen(4, b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        watched(5, video[: len(video) // 2], sound=False),
        ("missing", chat({"type": "image", "image": "7.png"}, "x"), {"0.png": image}),
    ]
    good = [heard(n, data) for n, data in enumerate(sounds(30), start=100)]
    config = dataclasses.replace(
        mixed, sources=[SourceConfig(str(write([*bad, *good])))], max_skip_fraction=0.5, workers=workers
    )
    rows = evaluation_rows(config, MODEL, split="train", rows=1000)
    assert sum(row.samples for row in rows) == 30
    skipped: dict[str, int] = {}
    for row in rows:
        skipped = {**skipped, **{reason: skipped.get(reason, 0) + n for reason, n in row.skipped.items()}}
    assert sum(skipped.values()) == len(bad)
    assert skipped.pop("media_missing") == 1
    assert {reason.split("_")[0] for reason in skipped} == {"audio", "image", "video"}
    endless = take(build_loader(config, MODEL, seed=SEED), 30)
    assert {reason for row in endless for reason in row.skipped} == {*skipped, "media_missing"}
    assert capfd.readouterr() == ("", "")


def resident(process: int) -> float:
    """MiB of memory that are this process's own, shared ones left out."""
    size, shared = (int(pages) for pages in Path(f"/proc/{process}/statm").read_text().split()[1:3])
    return (size - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def rows_mapped() -> int:
    """Rows out of workers whose memory this process has mapped."""
    return sum("memfd:omni_train" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_memory_files_and_processes_stay_the_same_over_five_thousand_samples(mixed, write):
    clips, pictures = sounds(40, longest=0.3), images(40, largest=48)
    samples = [make(n, data) for n in range(20) for make, data in ((heard, clips[n]), (seen, pictures[n]))]
    broken = [heard(900, clips[0][:30]), seen(901, pictures[0][:100])]
    config = dataclasses.replace(
        mixed,
        sources=[SourceConfig(str(write([*samples, *broken])))],
        row_tokens=2048,
        streams=1,
        workers=1,
        alignment=4,
        max_skip_fraction=0.2,
    )
    mapped = rows_mapped()
    loader = build_loader(config, MODEL, seed=SEED)
    seen_samples, used = 0, []
    for number, row in enumerate(itertools.islice(loader, 1000)):
        seen_samples += row.samples
        (worker,) = (process.pid for process in workers_of(loader))
        if number % 10 == 9:
            files = [len(os.listdir(f"/proc/{process}/fd")) for process in (os.getpid(), worker)]
            used.append((resident(os.getpid()), resident(worker), *files))
        if seen_samples >= 5000:
            break
    assert seen_samples >= 5000
    early, late = np.array(used[2:5]).max(0), np.array(used[-3:]).max(0)
    assert (late[:2] < early[:2] + 24).all(), used
    assert (late[2:] <= early[2:] + 16).all(), used
    del row
    loader.close()
    assert not psutil.pid_exists(worker)
    del loader
    assert rows_mapped() == mapped
