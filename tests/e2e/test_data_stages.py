"""One pipeline from a codec's training to its codes and what learns from them, stopped on its way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from omni_train.data_pipelines.making import Making
from omni_train.frozen.codec import codec_hash
from omni_train.processes import Exit
from tests.e2e.conftest import ROOT, Runs, kill
from tests.support.tiny_runs import write_speech

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="children end with their parent on Linux"
)


@pytest.fixture(scope="module")
def spoken(world, tmp_path_factory) -> Path:
    """A folder of speech with a tokenizer in it."""
    folder = tmp_path_factory.mktemp("spoken")
    write_speech(folder)
    (folder / "speech" / "tokenizer").symlink_to(world / "tokenizer")
    return folder / "speech"


def write_pipeline(folder: Path, spoken: Path) -> Path:
    losses = {
        "mel_windows": [64, 256],
        "mel_bins": [8, 32],
        "discriminators": "{stft_windows:[256],stft_channels:4,periods:[2],period_channels:[4]}",
    }
    shared = {
        "model": "tiny",
        "precision": "fp32",
        "data": "rehearsal_crops",
        "data.row_tokens": 10,
        "data.crop_seconds": 0.4,
        "data.streams": 2,
        "data.workers": 1,
        "data.shuffle_buffer": 4,
        "data.packing_buffer": 4,
        "schedule": "smoke",
        "schedule.steps": 2,
        "schedule.global_batch": 2,
        **{f"codec_training.{key}": value for key, value in losses.items()},
    }
    stages = {
        "codec": [f"data.path={spoken}", f"data.sources=[{{path: {spoken}}}]"],
        "codes": ["command=data codes", f"data={spoken}", "codec=codec", "max_seconds=7"],
        "code2wav": ["data.path=codes", "data.sources=[{path: '${data.path}'}]", "data.codec=codec"],
    }
    words = [f"{key}={value}".replace(" ", "") for key, value in shared.items()]
    path = folder / "speech.yaml"
    path.write_text(yaml.safe_dump({"all": words, "stages": stages}, sort_keys=False))
    return path


def start(path: Path, ranks: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "omni_train", "launch", str(ranks)]
    words = ["pipeline", f"name={path}", f"runs_dir={path.parent}", "codes.workers=1"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*launch, *words], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def test_stopped_while_it_makes_data_it_goes_on_and_trains_on_them(spoken, world, tmp_path):
    path = write_pipeline(tmp_path, spoken)
    codes = tmp_path / "speech" / "codes"
    process = start(path, ranks=2)
    try:
        Runs(world, tmp_path).wait((codes / ".coded" / "settings.json").exists, process)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        psutil.wait_procs(started, timeout=30)
        assert not [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    finally:
        kill(process)
    assert process.returncode == Exit.stopped, err
    assert re.search(r"stopped by SIGTERM in stage 2 of 3, codes; the same command goes on from here$", err.strip())
    assert not (codes / "codec.json").exists()

    process = start(path, ranks=1)
    try:
        out, err = process.communicate(timeout=150)
    finally:
        kill(process)
    assert process.returncode == 0, err + out
    assert "stage 1 of 3, codec: complete, skipped" in err
    command = f"omni-train data codes data={spoken} codec=.*/codec/checkpoints/step_00000002 max_seconds=7 workers=1"
    assert re.search(f"stage 2 of 3, codes: {command} out={codes}", err)
    checkpoint = tmp_path / "speech" / "codec" / "checkpoints" / "step_00000002"
    assert json.loads((codes / "codec.json").read_text())["codec"] == codec_hash(str(checkpoint))
    assert Making(codes, "coded").records(["train-00000.tar"])["train-00000.tar"]["missing"] == {}
    recipe = yaml.safe_load((tmp_path / "speech" / "code2wav" / "recipe.yaml").read_text())
    assert recipe["data"]["sources"][0]["path"] == str(codes)
    assert recipe["data"]["tokenizer"] == f"{codes}/tokenizer"
    assert recipe["data"]["codec"] == str(checkpoint)
    assert len(Runs(world, tmp_path).metrics("speech/code2wav")) >= 2
    report = (tmp_path / "speech" / "report" / "report.md").read_text()
    assert re.findall(r"^\| (\w+) \|", report, re.MULTILINE)[:3] == ["stage", "codec", "code2wav"]
