"""A kind of media that the package does not have, added in one place: from the part of a chat to the row and beyond."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from omni_train.data.rows.batch import IGNORE, MODALITIES
from omni_train.data.rows.kinds import held_out
from omni_train.data.samples import kinds
from omni_train.data.samples.clips import Clip
from omni_train.data.samples.kinds import MediumKind, register_medium
from omni_train.data.samples.layout import Marks
from omni_train.data.samples.parsing import named_files, parse_sample
from omni_train.data.samples.positions import Pad, Stretch
from omni_train.data.samples.sample import Medium, SampleError
from omni_train.data.stream.loader import evaluation_rows
from omni_train.recipe.schema import EvaluationConfig, MediaConfig, Positions, SourceConfig
from tests.data.conftest import MODEL
from tests.support.media import image_file, sound_file, tone

START, END, NOTE = "<|quad_start|>", "<|quad_end|>", Pad("<|vision_pad|>", "vision")
BYTES = 4  # of a note


class Notes(MediumKind):
    """What is played: a token for each note, through the encoder of what is seen."""

    name, modalities, timed, wandb, shown = "notes", ("notes",), True, "Html", (".mid",)

    def encoders(self, medium):
        return ("vision",)

    def read(self, medium, data, model, media, *, max_tokens=None, sound_tokens=None):
        if len(data) % BYTES:
            raise SampleError("notes_damaged")
        notes, merge = len(data) // BYTES, model.vision.spatial_merge_size
        patches = np.repeat(np.frombuffer(data, np.uint8).reshape(notes, BYTES), merge**2, axis=0)
        width = 3 * model.vision.temporal_patch_size * model.vision.patch_size**2
        return Clip(
            "notes",
            [Marks((START,)), Stretch(notes, pad=NOTE), Marks((END,), continues=True)],
            vision_tokens=notes,
            patches=np.tile(patches, width // BYTES),
            grid=(1, merge, merge * notes),
        )


@pytest.fixture(autouse=True)
def notes(monkeypatch) -> Iterator[None]:
    modalities = list(MODALITIES)
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    register_medium(Notes())
    yield
    MODALITIES[:] = modalities


def played(*parts: dict, answer: str = "kalan") -> dict:
    question = [*parts, {"type": "text", "text": "moper?"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


NOTES = {"type": "notes", "notes": "0.mid"}
SONG = bytes(range(20))  # five notes


ALONE = ("s-0", played(NOTES), {"0.mid": SONG})
BROKEN = ("s-1", played(NOTES), {"0.mid": SONG[:7]})


@pytest.fixture
def songs(config, write):
    """songs(samples) is the configuration with these as its only source."""

    def of(*samples):
        sources = [SourceConfig(str(write(list(samples), shards=1)))]
        return dataclasses.replace(
            config, sources=sources, max_skip_fraction=1.0, media=MediaConfig(image_min_pixels=1024)
        )

    return of


@pytest.mark.parametrize("positions", list(Positions))
def test_it_stands_in_a_row_with_its_tokens_features_and_rotary_ids(songs, tokenizer, positions):
    data = songs(ALONE, BROKEN)
    data.media.positions = positions
    (song,) = evaluation_rows(data, MODEL, split="train", rows=1)
    places = song.vision_slots.tolist()
    assert places == list(range(places[0], places[0] + 5))
    assert set(song.tokens[places].tolist()) == {tokenizer.token_id(NOTE.token)}
    around = [song.tokens[places[0] - 1].item(), song.tokens[places[-1] + 1].item()]
    assert around == [tokenizer.token_id(START), tokenizer.token_id(END)]
    assert song.grid_thw.tolist() == [[1, 2, 10]]
    assert song.patches.shape == (20, 1536) and song.patches[::4, :4].flatten().tolist() == list(SONG)
    ids = song.position_ids[:, places]
    assert torch.equal(ids, torch.arange(places[0], places[0] + 5).expand(3, 5).to(ids.dtype))
    assert {MODALITIES[index] for index in song.modality[~song.padding].tolist()} == {"notes"}
    assert (song.labels[places] == IGNORE).all() and (song.labels != IGNORE).any()


def test_it_stands_beside_the_media_that_there_are(songs, tokenizer):
    image, sound = image_file(np.zeros((64, 64, 3), np.uint8)), sound_file(tone(0.5), format="WAV")
    parts = [{"type": "image", "image": "1.png"}, {"type": "audio", "audio": "2.wav"}, NOTES]
    files = {"0.mid": SONG[:8], "1.png": image, "2.wav": sound}
    (row,) = evaluation_rows(songs(("s-0", played(*parts), files)), MODEL, split="train", rows=1)
    tokens = row.tokens[row.vision_slots].tolist()
    pixels = len(tokens) - 2
    assert len(row.audio_slots) > 0
    assert pixels > 0
    assert tokens == [tokenizer.token_id("<|image_pad|>")] * pixels + [tokenizer.token_id(NOTE.token)] * 2
    assert len(row.patches) == 4 * len(tokens) and row.grid_thw[-1].tolist() == [1, 2, 4]


def test_what_cannot_be_read_or_seen_is_refused_by_name(songs):
    data = songs(ALONE, BROKEN)
    for model, expected in (
        (MODEL, {"notes_damaged": 1}),
        (dataclasses.replace(MODEL, vision=None), {"no_vision_encoder": 2}),
    ):
        refused = Counter()
        questions = held_out(data, model, EvaluationConfig(), split="train", refused=refused)
        assert (refused, len(questions)) == (expected, 2 - refused.total())


def test_its_parts_are_parsed_as_it_says():
    def parsed(**part):
        return parse_sample(json.dumps(played(NOTES | part)).encode())

    assert parsed(start=1.0, end=2.0).media == (Medium("notes", "0.mid", start=1.0, end=2.0),)
    assert named_files(played(NOTES)) == [(NOTES, "notes")]
    for wrong, reason in (({"sound": True}, "unknown_schema"), ({"tempo": 3}, "unknown_key_tempo")):
        with pytest.raises(SampleError, match=reason):
            parsed(**wrong)
    with pytest.raises(SampleError, match="unknown_part"):
        parse_sample(json.dumps(played(NOTES | {"type": "scores"})).encode())


def test_a_tracker_shows_its_files(tmp_path):
    from omni_train.evaluation.base import Medium as Shown
    from omni_train.tracking.weights_and_biases import Wandb

    tracker = object.__new__(Wandb)
    tracker._directory, tracker._wandb = tmp_path, SimpleNamespace(Html=lambda path: ("Html", path))
    assert tracker._shown(Shown("notes", "songs/0/0.mid", SONG)) == ("Html", str(tmp_path / "songs/0/0.mid"))
    assert (tmp_path / "songs/0/0.mid").read_bytes() == SONG
    assert tracker._shown(Shown("notes", "songs/0/0.txt", SONG)) is None


def test_a_pack_counts_what_its_processes_read_of_it(tmp_path, monkeypatch):
    """The process that adds up has parsed no sample, and still knows the modality."""
    from omni_train import plugins
    from omni_train.data_pipelines.pack.statistics import Statistics

    (tmp_path / "scores_plugin.py").write_text(
        "from omni_train.data.samples.kinds import MediumKind, register_medium\n"
        "register_medium(type('Scores', (MediumKind,), {'name': 'scores', 'modalities': ('scores',)}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(plugins.VARIABLE, "scores_plugin")
    plugins.load.cache_clear()
    try:
        statistics = Statistics()
    finally:
        plugins.load.cache_clear()
    assert "scores" in statistics.lengths


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="notes: a kind of media has these names already"):
        register_medium(Notes())
