"""Scores of speech beside every sample: the same shards however they are made, with all else as it was."""

from __future__ import annotations

import functools
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from omni_train.data.stream.loader import build_loader
from omni_train.data_pipelines.rehearsal import tokenizer as rehearsal_tokenizer
from omni_train.data_pipelines.shards import digest, index_shards, write_shards
from omni_train.data_pipelines.strata import Speech, score
from omni_train.errors import UserError
from omni_train.recipe.schema import DataConfig, QualityConfig, SourceConfig, StratumConfig
from tests.data.conftest import MODEL
from tests.data_pipelines.test_codes import contents, files_of
from tests.support.codec import voice
from tests.support.media import sound_file

SAMPLES = [700 + 173 * n for n in range(19)]
RATES = (24000, 44100, 96000)


@dataclass(frozen=True)
class Ruler:
    """A judge that is quick to open, and kills its process at a sample of `killed_at` while that file exists."""

    flag: Path
    killed_at: str = ""
    name: str = "ruler"

    @property
    def settings(self) -> dict[str, str]:
        return {"recognizer": self.name}

    def __call__(self, speech: Speech) -> dict[str, float | str]:
        if speech.text == self.killed_at and self.flag.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return {
            "seconds": len(speech.waveform) / speech.sampling_rate,
            "snr_db": speech.sampling_rate / 3000,
            "dnsmos": "silent_or_too_short" if speech.text == "word 3" else 1 + float(np.abs(speech.waveform).max()),
        }


def ruler(flag: Path, killed_at: str = "", name: str = "ruler"):
    return functools.partial(Ruler, flag, killed_at, name)


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Speech with codes in four shards, one sample without any and one that is damaged."""
    folder = tmp_path_factory.mktemp("speech") / "speech"
    samples = [
        (
            f"s-{n:03d}",
            {"text": f"word {n}", "speech": "0.wav", "meta": {"source": "böök", "quality": {"dnsmos": 0}}},
            {"0.wav": sound_file(voice(length, n).numpy()[:, None], RATES[n % 3], "WAV"), "codes.npy": b"codes"},
        )
        for n, length in enumerate(SAMPLES)
    ]
    samples.insert(4, ("t-000", {"text": "nobody says this"}))
    samples.insert(9, ("d-000", {"text": "x", "speech": "0.wav"}, {"0.wav": b"RIFF what?"}))
    write_shards(folder, "train", samples[:-6], 3)
    write_shards(folder, "val", samples[-6:], 1)
    index_shards(folder)
    rehearsal_tokenizer.train(["what is said here"], folder / "tokenizer", 270)
    (folder / "codec.json").write_text('{"codec": "c0dec", "shards": {}}')
    return folder


@pytest.fixture(scope="module")
def scored(speech, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    score(speech, ruler(out.parent / "flag"), out, workers=1)
    return out


def test_every_sample_keeps_its_files_and_its_speech_gets_scores(speech, scored):
    for split in ("train", "val"):
        before, after = files_of(speech, split), files_of(scored, split)
        assert list(before) == list(after)
        for text, parts in after.items():
            ours, theirs = json.loads(parts.pop("json")), json.loads(before[text].pop("json"))
            assert parts == before[text]
            if text.startswith("word"):
                n, quality = int(text.split()[1]), ours["meta"].pop("quality")
                theirs["meta"].pop("quality")
                rate = min(RATES[n % 3], 48000)
                assert quality["seconds"] == pytest.approx(SAMPLES[n] / RATES[n % 3], abs=1e-3)
                assert quality["snr_db"] == round(rate / 3000, 4)
                assert ("dnsmos" in quality) == (n != 3)
            assert ours == theirs
    assert (scored / "codec.json").read_bytes() == (speech / "codec.json").read_bytes()


def test_the_page_tells_percentiles_and_what_could_not_be_measured(scored, capsys, speech):
    page = (scored / "strata.md").read_text()
    assert f"{len(SAMPLES) + 2} samples" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| snr_db")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    rates = [min(RATES[n % 3], 48000) / 3000 for n in range(len(SAMPLES))]
    assert cells[1] == str(len(SAMPLES))
    assert cells[2:] == [f"{x:.4g}" for x in (np.mean(rates), *np.percentile(rates, (1, 5, 25, 50, 75, 95, 99)))]
    for line in ("| audio_damaged | 1 |", "| no_speech | 1 |", "| dnsmos: silent_or_too_short | 1 |"):
        assert line in page
    assert (scored / "strata.png").stat().st_size > 5000
    score(speech, ruler(scored.parent / "flag"), scored, workers=1)  # complete: it only tells so again
    told = capsys.readouterr().out
    assert "scores in 4 shards, see strata.md; without scores: audio_damaged 1, no_speech 1" in told


def test_killed_and_started_again_with_more_processes_it_gives_the_same_bytes(speech, scored, tmp_path):
    out, flag = tmp_path / "out", tmp_path / "flag"
    flag.touch()
    judge = ruler(flag, killed_at="word 11")
    with pytest.raises(UserError, match=r"a process was killed .*; the same command goes on from here"):
        score(speech, judge, out, workers=1)
    made = {file.name: file.stat().st_mtime_ns for file in (out / ".scored").glob("*.tar.json")}
    assert 0 < len(made) < 4 and not (out / "codec.json").exists()
    flag.unlink()
    score(speech, judge, out, workers=2)
    assert contents(out) == {
        name: digest([out / name]) if name == ".scored/settings.json" else found
        for name, found in contents(scored).items()
    }
    assert all((out / ".scored" / name).stat().st_mtime_ns == when for name, when in made.items())


def test_a_recipe_reads_the_scores(scored):
    data = DataConfig(
        name="scored",
        path="unused",
        sources=[SourceConfig(str(scored))],
        tokenizer=str(scored / "tokenizer"),
        row_tokens=64,
        streams=1,
        workers=0,
        strata=[StratumConfig("high", QualityConfig(snr_db=[14.0, None])), StratumConfig("rest", weight=0.0)],
    )
    row = next(build_loader(data, MODEL, seed=5))
    assert set(row.strata) == {"high"} and not row.skipped


def test_folders_that_cannot_work_are_refused(speech, scored, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    judge = ruler(tmp_path)
    for words, message in (
        ((speech, ruler(tmp_path, name="other"), scored), "scored there with another recognizer"),
        ((speech, judge, tmp_path / "mine"), "not empty"),
        ((speech, judge, speech), "is data itself"),
        ((tmp_path, judge, tmp_path / "out"), "no shards"),
        ((speech, judge, tmp_path / "out", -1), "workers=-1"),
        ((speech, judge, tmp_path / "out", 1, 0.0), "max_seconds must be above 0"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            score(*words)
        assert "\n" not in str(refused.value)
