"""The page that `make bench` writes."""

from __future__ import annotations

import pytest

import benchmarks.__main__ as bench
from benchmarks import talker, talker_reference, train_step
from omni_train.data.rows.batch import IGNORE

ROWS = [{"name": "speed", "value": 12345.678, "unit": "tokens/s"}, {"name": "ratio", "value": 1.23456, "unit": "×"}]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page with old results, and benchmarks that take no time."""
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n\nProse.\n\n## Results\n\nold figures\n")
    monkeypatch.setattr(bench, "PAGE", page)
    monkeypatch.setattr(bench, "NAMES", ("train_step",))
    monkeypatch.setattr(train_step, "run", lambda: ROWS)
    return page


def test_results_replace_the_old_ones_and_name_the_machine(page):
    assert bench.main([]) == 0
    text = page.read_text()
    assert text.startswith("# Performance\n\nProse.\n\n## Results\n\n20")
    assert "| speed | 12,346 | tokens/s |\n| ratio | 1.23 | × |\n" in text
    assert "torch" in text
    assert "old figures" not in text


def test_a_partial_run_leaves_the_page_alone(page):
    assert bench.main(["train_step"]) == 0
    assert "old figures" in page.read_text()


def test_an_unknown_benchmark_is_one_line_and_exit_2(page, capsys):
    assert bench.main(["speed"]) == 2
    assert capsys.readouterr().err == "no benchmark speed; choose from train_step\n"


def test_both_sides_see_the_same_tokens_whether_packed_or_padded():
    tokens = train_step.samples("mixed")
    rows, batches = train_step.packed(tokens, alignment=16), train_step.padded(tokens)
    assert sum(int((~row.padding).sum()) for row in rows) == sum(map(len, tokens))
    assert sum(int((batch["input_ids"] != 0).sum()) for batch in batches) == sum(map(len, tokens))
    assert sum(row.num_loss_tokens for row in rows) == sum(len(ids) - 1 for ids in tokens)


@pytest.mark.parametrize("live", [False, True])
def test_both_sides_see_the_same_frames_whether_packed_or_padded(live):
    plans = talker.utterances(talker.SIZES[0])
    row, batches = talker.packed(talker.SIZES[0], live), talker_reference.padded(plans, 3)
    frames = sum(len(plan) - talker.HEAD for plan in plans)
    assert frames == int((row.label_codes[:, 0] != IGNORE).sum())
    assert frames == sum(int((batch["label_codes"][..., 0] != IGNORE).sum()) for batch in batches)
    for name, padded, fill in (("speech_labels", "labels", IGNORE), ("codes", "codes", -1)):
        values = getattr(row, name), *(batch[padded] for batch in batches)
        ours, *theirs = (int(value[value != fill].sum()) for value in values)
        assert ours == sum(theirs) > 0
    assert len(row.context) == live * talker.READ * len(plans)
