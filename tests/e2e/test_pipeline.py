"""Stages one after the other in the same processes: what each trains, and what a second start does."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from omni_train.data_pipelines.shards import index_shards, write_shards
from tests.distributed.test_checkpoints import read_plain
from tests.e2e.conftest import ROOT, Runs, kill
from tests.support.media import image_file, sound_file, tone

S1 = {
    "s1_audio_adapter": "audio_adapter.*",
    "s1_audio_encoder": "audio_encoder.*",
    "s1_vision_adapter": "vision_adapter.*",
    "s1_vision_encoder": "vision_encoder.*",
}


def samples(kind: str, name: str, files: list[bytes], split: str) -> list[tuple]:
    """Questions about a medium each, with an answer of a word."""
    made = []
    for n, data in enumerate(files):
        question = [{"type": kind, kind: name}, {"type": "text", "text": "kalan?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"mo{n}"}]
        made.append((f"{split}-{n:03d}", {"messages": messages}, {name: data}))
    return made


@pytest.fixture(scope="module")
def omni(world, tmp_path_factory) -> Path:
    """Folders ``audio`` and ``image`` beside the world's ``text`` and ``tokenizer``."""
    folder = tmp_path_factory.mktemp("omni")
    for name in ("text", "tokenizer"):
        (folder / name).symlink_to(world / name)
    colors = np.random.default_rng(1).integers(0, 256, (24, 1, 1, 3), dtype=np.uint8)
    for split in ("train", "val"):
        sounds = [sound_file(tone(0.3 + n / 20, hertz=150 + 40 * n)) for n in range(24)]
        images = [image_file(np.tile(color, (64, 96, 1))) for color in colors]
        write_shards(folder / "audio", split, samples("audio", "0.flac", sounds, split), shards=1)
        write_shards(folder / "image", split, samples("image", "0.png", images, split), shards=1)
    for name in ("audio", "image"):
        index_shards(folder / name)
    return folder


@dataclass
class Pipelines:
    """Starts a pipeline over the stages up to S1, small, on two tensor ranks."""

    omni: Path
    folder: Path
    s1: tuple[str, ...] = tuple(S1)

    def words(self) -> list[str]:
        shared = [
            "model=tiny",
            "model.vocab_size=320",
            "model.thinker.repeats=1",
            "model.thinker.hidden_size=64",
            "model.vision.num_position_embeddings=16",
            f"data.path={self.omni}",
            "data.row_tokens=256",
            "data.streams=2",
            "data.workers=1",
            "data.shuffle_buffer=8",
            "data.packing_buffer=8",
            "data.media.image_min_pixels=1024",
            f"runs_dir={self.folder}",
            "precision=fp32",
            "recompute=none",
            "schedule.steps=3",
            "schedule.log_every=1",
            "schedule.global_batch=2",
            "schedule.warmup_fraction=0",
            "optimizer.weight_decay=0",  # which changes parameters without gradients
            "checkpoint.save_every=2",
            "checkpoint.asynchronous=false",
            "parallel.tensor=2",
        ]
        stages: dict[str, list[str]] = {"text_pretrain": ["data=shards", f"data.sources=[{{path:{self.omni}/text}}]"]}
        stages |= {stage: [] for stage in self.s1} | {"s1_audio_adapter": ["schedule.steps=6"]}  # time to be killed in
        path = self.folder / "small.yaml"
        path.write_text(yaml.safe_dump({"all": shared, "stages": stages}, sort_keys=False))
        return [f"name={path}", "run=p"]

    def start(self, *words: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [str(ROOT / "launchers" / "local.sh"), "2", "pipeline", *self.words(), *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def finish(self, *words: str, status: int = 0) -> str:
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=500)
        finally:
            kill(process)
        assert process.returncode == status, err + out
        return err

    def checkpoint(self, stage: str) -> str:
        return str((self.folder / "p" / stage / "checkpoints" / "latest").resolve())

    def losses(self, stage: str) -> list[float]:
        return [line["loss"] for line in Runs(self.omni, self.folder).metrics(f"p/{stage}")]


@pytest.fixture(scope="module")
def whole(omni, tmp_path_factory) -> tuple[Pipelines, str]:
    """A pipeline that ran to its end, and what it said."""
    pipelines = Pipelines(omni, tmp_path_factory.mktemp("whole"))
    return pipelines, pipelines.finish()


def test_every_s1_stage_changes_all_of_its_part_and_nothing_else(whole, distributed):
    pipelines, _ = whole
    before = distributed(1, read_plain, pipelines.checkpoint("text_pretrain"))[0]
    for stage, trainable in S1.items():
        after = distributed(1, read_plain, pipelines.checkpoint(stage))[0]
        # The load of the experts is counted, not trained; the optimizer's state is of the stage alone.
        names = [name for name in after if not name.startswith("optimizer.") and not name.endswith("router.load")]
        assert any(fnmatchcase(name, trainable) for name in names)
        for name in names:
            assert torch.equal(before[name], after[name]) != fnmatchcase(name, trainable), (stage, name)
        before = after


def test_a_stage_trains_like_the_same_command_in_a_process_of_its_own(whole, tmp_path):
    pipelines, _ = whole
    recipe = yaml.safe_load((pipelines.folder / "p" / "s1_audio_encoder" / "recipe.yaml").read_text())
    assert recipe["init_from"] == f"{pipelines.folder}/p/s1_audio_adapter/checkpoints/step_00000006"
    shared = yaml.safe_load((pipelines.folder / "small.yaml").read_text())["all"]
    words = ["stage=s1_audio_encoder", *shared, f"runs_dir={tmp_path}", "run=alone", f"init_from={recipe['init_from']}"]
    command = [str(ROOT / "launchers" / "local.sh"), "2", "train", *dict.fromkeys(words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    alone = [line["loss"] for line in Runs(pipelines.omni, tmp_path).metrics("alone")]
    assert len(alone) == 3
    assert alone == pipelines.losses("s1_audio_encoder")


def test_it_says_what_starts_where(whole):
    _, err = whole
    assert re.findall(r"stage \d of 5, (\w+)", err) == ["text_pretrain", *S1]
    assert err.count("starting from ") == 4
    assert (whole[0].folder / "p" / "report" / "losses.png").exists()


def test_killed_and_started_again_it_skips_what_is_complete_and_ends_the_same(whole, omni, tmp_path):
    pipelines, _ = whole
    again = Pipelines(omni, tmp_path, s1=("s1_audio_adapter",))
    process = again.start()
    second = tmp_path / "p" / "s1_audio_adapter" / "checkpoints" / "step_00000002" / "metadata.json"
    Runs(omni, tmp_path).wait(second.exists, process, seconds=400)
    kill(process)
    err = again.finish()
    assert "stage 1 of 2, text_pretrain: complete, skipped" in err
    assert "s1_audio_adapter: complete" not in err
    assert re.search(r"resuming from \S+s1_audio_adapter/checkpoints/step_0000000[24] at step", err)
    for stage in ("text_pretrain", "s1_audio_adapter"):
        assert again.losses(stage), stage
        assert again.losses(stage) == pipelines.losses(stage), stage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["s1_audio_encoder.optimizer.lr=1e-5"],
            r"p/s1_audio_encoder: was made with optimizer\.lr=0\.0001, now .* 1e-05",
        ),
        (
            ["s1_audio_adapter.trainable=[audio_*]"],
            r"p/s1_audio_adapter: was made with trainable=\['audio_adapter\.\*'\], now",
        ),
    ],
    ids=["another rate", "other parameters"],
)
def test_a_stage_that_another_recipe_made_is_refused_in_one_line(whole, words, message):
    lines = whole[0].finish(*words, status=2).strip().splitlines()
    assert re.search(f"error: .*{message}", lines[-1])
    assert all("complete, skipped" in line for line in lines[:-1])
