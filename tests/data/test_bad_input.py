"""What a person or a disk can do wrong: one line that says so, or samples counted while the rest is used."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import shutil
import tarfile

import pytest

from omni_train.data.rows import kinds
from omni_train.data.samples import sources
from omni_train.data.stream.loader import build_loader, evaluation_rows
from omni_train.data.stream.states import redistribute
from omni_train.data_pipelines.shards import index_shards
from omni_train.errors import UserError
from omni_train.recipe.schema import EvaluationConfig, SourceConfig
from tests.data.conftest import MODEL, chats, documents

SEED = 37


@pytest.fixture
def source(config):
    """source(folder) is the configuration with that folder as its only source, read in order."""

    def only(folder, **changes):
        changes = {"shuffle_buffer": 1, "streams": 2, "max_skip_fraction": 0.4, **changes}
        return dataclasses.replace(config, sources=[SourceConfig(str(folder))], **changes)

    return only


def take(config, count):
    return list(itertools.islice(build_loader(config, MODEL, seed=SEED), count))


def skipped(rows):
    total = {}
    for row in rows:
        for reason, count in row.skipped.items():
            total[reason] = total.get(reason, 0) + count
    return total


def broken(samples, every):
    """``samples`` of which every ``every``-th is of no schema."""
    return [(key, {"caption": "x"} if n % every == 0 else fields) for n, (key, fields) in enumerate(samples)]


def test_a_missing_folder_is_named(source, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*/nowhere"):
        build_loader(source(tmp_path / "nowhere"), MODEL, seed=SEED)


def test_a_folder_without_index_gets_the_command_that_makes_one(source, write, tmp_path):
    folder = write(documents(30, seed=1))
    shutil.rmtree(folder / ".nv-meta")
    with pytest.raises(UserError, match=rf"no energon index; make one with `energon prepare .* {folder}`"):
        build_loader(source(folder), MODEL, seed=SEED)


def test_a_missing_split_is_named(source, write):
    with pytest.raises(UserError, match="'val'"):
        evaluation_rows(source(write(documents(30, seed=1))), MODEL, rows=3)


@pytest.mark.parametrize("suffix", [".tar", ".tar.idx"])
def test_a_missing_shard_is_named(source, write, suffix):
    folder = write(documents(30, seed=1))
    (folder / f"train-00001{suffix}").unlink()
    with pytest.raises(UserError, match=rf"train-00001{suffix} is missing"):
        build_loader(source(folder), MODEL, seed=SEED)


def test_a_damaged_index_is_one_line(source, write):
    folder = write(documents(30, seed=1))
    (folder / ".nv-meta" / "split.yaml").write_text("split_parts: [")
    with pytest.raises(UserError, match="energon prepare") as error:
        build_loader(source(folder), MODEL, seed=SEED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "data.sources is empty"),
        ({"row_tokens": 200}, "row_tokens=200 must be a multiple of data.alignment=16"),
        ({"streams": 3, "workers": 2}, r"streams=3 must be a multiple .*set data.streams=4"),
        ({"streams": 64}, "streams=64 are more than the 30 samples"),
        ({"tokenizer": "nowhere"}, r"data.tokenizer=nowhere: no tokenizer\.json"),
    ],
)
def test_an_impossible_configuration_is_refused(source, write, changes, message):
    with pytest.raises(UserError, match=message):
        build_loader(dataclasses.replace(source(write(documents(30, seed=1))), **changes), MODEL, seed=SEED)


def test_a_weight_of_nothing_is_refused(config):
    config.sources[1].weight = 0.0
    with pytest.raises(UserError, match=r"weight=0\.0 of .*chat"):
        build_loader(config, MODEL, seed=SEED)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_gives_what_can_be_read_and_the_rest_is_counted(source, write, workers, capfd):
    samples = documents(90, seed=3)
    folder = write(samples, shards=3)
    shard = folder / "train-00001.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmember("text-00049.json").offset_data + 5  # the 17th of 30 samples of its shard
    with shard.open("r+b") as file:
        file.truncate(cut)
    rows = evaluation_rows(source(folder), MODEL, split="train", rows=10_000)
    assert skipped(rows) == {"truncated_shard": 14}
    assert sum(row.samples for row in rows) == 90 - 14
    endless = skipped(take(source(folder, workers=workers), 60))
    assert set(endless) == {"truncated_shard"}
    assert capfd.readouterr() == ("", "")


def test_noise_inside_a_shard_costs_only_the_samples_it_hit(source, write):
    folder = write(documents(60, seed=3), shards=2)
    with tarfile.open(folder / "train-00000.tar") as tar:
        header, data = tar.getmember("text-00020.json").offset, tar.getmember("text-00040.json").offset_data
    with (folder / "train-00000.tar").open("r+b") as file:
        file.seek(header)
        file.write(b"\xa5" * 512)
        file.seek(data)
        file.write(b"\xa5" * 4)
    rows = evaluation_rows(source(folder), MODEL, split="train", rows=10_000)
    assert skipped(rows) == {"broken_shard": 1, "broken_json": 1}
    assert sum(row.samples for row in rows) == 58


def test_a_shard_that_disappears_during_a_run_is_counted(source, write):
    folder = write(documents(60, seed=3), shards=3)
    loader = build_loader(source(folder), MODEL, seed=SEED)
    (folder / "train-00001.tar").unlink()
    assert set(skipped(itertools.islice(loader, 40))) == {"unreadable_shard"}


def test_refused_samples_are_counted_by_reason(source, write):
    long_chat = {"messages": [{"role": "assistant", "content": "kalan " * 300}]}
    image = [{"type": "image", "image": "0.png"}]  # which the key lacks
    image = {"messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "kalan"}]}
    samples = [*documents(40, seed=2), ("a", long_chat), ("b", image), ("c", {"caption": "x"}), ("d", {"caption": "y"})]
    samples = [*samples, *((f"z-{key}", fields) for key, fields in documents(10, seed=6))]
    rows = evaluation_rows(source(write(samples)), MODEL, split="train", rows=10_000)
    assert skipped(rows) == {"too_long": 1, "media_missing": 1, "no_messages": 2}
    assert sum(row.samples for row in rows) == 50


def test_an_unexpected_error_costs_its_held_out_sample_alone(source, write, monkeypatch):
    config = source(write(chats(6, seed=2), shards=1))

    def fragile(original, what):
        def call(given, *args, **kwargs):
            if what(given):
                raise ZeroDivisionError("nothing to divide by")
            return original(given, *args, **kwargs)

        return call

    monkeypatch.setattr(sources, "sample_in", fragile(sources.sample_in, lambda parts: b'"0 ' in parts["json"]))
    monkeypatch.setattr(kinds, "prompt", fragile(kinds.prompt, lambda chat: chat.turns[0].text[0] == "1"))
    refused = collections.Counter()
    questions = kinds.held_out(config, MODEL, EvaluationConfig(), split="train", refused=refused)
    assert refused == {"unexpected_ZeroDivisionError": 2}
    assert [question.text[0] for question in questions] == ["2", "3", "4", "5"]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_refused_samples_stop_the_run_after_a_thousand(source, write, workers):
    config = source(write(broken(documents(200, seed=4), every=10)), workers=workers, max_skip_fraction=0.05)
    loader = build_loader(config, MODEL, seed=SEED)
    seen = 0
    with pytest.raises(UserError, match=r"of 1,0\d\d samples were refused \(no_messages \d+\), more than .*=0\.05"):
        for row in itertools.islice(loader, 2000):
            seen += row.samples + sum(row.skipped.values())
    assert 900 < seen < 1100


def test_a_few_refused_samples_do_not_stop_the_run(source, write):
    loader = build_loader(
        source(write(broken(documents(200, seed=4), every=10)), max_skip_fraction=0.2), MODEL, seed=SEED
    )
    seen = sum(row.samples + sum(row.skipped.values()) for row in itertools.islice(loader, 700))
    assert seen > 1500


def test_the_count_of_refused_samples_survives_a_resume(source, write):
    config = source(write(broken(documents(200, seed=4), every=10)), max_skip_fraction=0.05)

    def stops_after(loader):
        rows = 0
        with pytest.raises(UserError) as error:
            for _ in itertools.islice(loader, 2000):
                rows += 1
        return rows, str(error.value)

    loader = build_loader(config, MODEL, seed=SEED)
    list(itertools.islice(loader, 50))
    restored = build_loader(config, MODEL, seed=SEED)
    restored.load_state_dict(loader.state_dict())
    assert stops_after(restored) == stops_after(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_any_usable_sample_ends_in_an_error(source, write, workers, capfd):
    config = source(write([(f"k-{n}", {"caption": str(n)}) for n in range(12)]), workers=workers, max_skip_fraction=1.0)
    with pytest.raises(UserError, match=r"1,000 samples in a row of .*/shards were refused \(no_messages 1,000\)"):
        next(build_loader(config, MODEL, seed=SEED))
    with pytest.raises(UserError, match="train split gives 0 of the 5 evaluation rows"):
        evaluation_rows(config, MODEL, split="train", rows=5)
    assert capfd.readouterr() == ("", "")


def test_a_state_of_other_data_or_streams_is_refused(config, source, write):
    state = build_loader(config, MODEL, seed=SEED).state_dict()
    with pytest.raises(UserError, match="samples per source"):
        build_loader(source(write(documents(30, seed=1))), MODEL, seed=SEED).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.streams=8 over 1 data ranks is not the checkpoint's 4 over 1"):
        build_loader(dataclasses.replace(config, streams=8), MODEL, seed=SEED).load_state_dict(state)
    with pytest.raises(UserError, match="over 2 data ranks"):
        build_loader(config, MODEL, seed=SEED, data_world_size=2).load_state_dict(state)


def test_an_uneven_redistribution_is_refused(config):
    state = build_loader(config, MODEL, seed=SEED).state_dict()
    with pytest.raises(UserError, match="4 streams and 0 rows taken by 1 data ranks cannot be shared evenly among 3"):
        redistribute([state], 3)
    odd = dict(state, rows=7)
    with pytest.raises(UserError, match="7 rows taken"):
        redistribute([odd], 2)
    with pytest.raises(UserError, match="different numbers of rows"):
        redistribute([state, odd], 1)


def test_an_object_store_url_is_read_through_the_storage_client(config, source, write, tmp_path, monkeypatch):
    write(documents(60, seed=3), name="text")
    profiles = {"profiles": {"store": {"storage_provider": {"type": "file", "options": {"base_path": str(tmp_path)}}}}}
    (tmp_path / "msc.json").write_text(json.dumps(profiles))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    remote, local = take(source("msc://store/text"), 9), take(source(tmp_path / "text"), 9)
    assert [row.tokens.tolist() for row in remote] == [row.tokens.tolist() for row in local]
    with pytest.raises(UserError, match="msc://store/nowhere"):
        build_loader(source("msc://store/nowhere"), MODEL, seed=SEED)


def test_other_urls_take_the_name_that_the_storage_client_gives_them(monkeypatch):
    client = type("Client", (), {"profile": "_s3-bucket"})
    monkeypatch.setattr(
        sources.multistorageclient, "resolve_storage_client", {"s3://bucket/corpus/v1": (client, "corpus/v1")}.get
    )
    monkeypatch.setattr(sources, "EPath", str)
    assert sources.energon_path("s3://bucket/corpus/v1") == "msc://_s3-bucket/corpus/v1"
    assert sources.energon_path("msc://store/corpus//v1") == "msc://store/corpus//v1"
    assert sources.energon_path("a/b") == "a/b"


def test_indexing_again_after_repair_is_enough(source, write):
    folder = write(documents(30, seed=1))
    shutil.rmtree(folder / ".nv-meta")
    index_shards(folder)
    assert len(take(source(folder), 3)) == 3
