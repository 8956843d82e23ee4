"""A run starts each of its parts from the checkpoint that the recipe says, or fresh, in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omni_train.recipe.schema import CheckpointConfig, ParallelConfig
from tests.distributed.test_checkpoints import plain_tensors
from tests.support.pool import RankFailed
from tests.support.recognizer import recognizer_recipe, write_recognizer
from tests.support.thinker import encoders, small_recipe


def write(rank, world_size, parallel, folder, options, changes):
    """Initialise a model as `options` say and write what it starts as; its tensors, without the extra state."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.checkpoint.start import initialize
    from omni_train.models.thinker import build_chunks

    recipe = replace(small_recipe(parallel, **changes), **options)
    platform.parallel.initialize(parallel, recipe.seed)
    chunks = build_chunks(recipe)
    initialize(chunks, recipe)
    store = CheckpointStore(Path(folder), CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, chunks, None, {}, None)
    store.close()
    latest = store.latest()
    platform.parallel.destroy()
    return plain_tensors(str(latest)) if rank == 0 else None


MTP = {"mtp_num_hidden_layers": 1}


@pytest.fixture(scope="module")
def written(distributed, tmp_path_factory):
    """Two checkpoints, of one layout each, and their tensors: `plain` on one rank, `mtp` by two tensor ranks."""
    folder = tmp_path_factory.mktemp("initial")
    plain = distributed(1, write, ParallelConfig(), folder / "plain", {"seed": 5}, {})[0]
    mtp = distributed(2, write, ParallelConfig(tensor=2), folder / "mtp", {"seed": 6}, MTP)[0]
    return folder, {"plain": plain, "mtp": mtp}


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(tensor=2, pipeline=2)],
    ids=["TP2", "PP2", "TP2-PP2"],
)
def test_every_part_comes_from_its_own_checkpoint_in_any_layout(distributed, written, tmp_path, parallel):
    folder, tensors = written
    options = {
        "init_from": str(folder / "plain"),
        "init_parts": {"decoder.layers.[45].*": str(folder / "mtp"), "mtp.*": str(folder / "mtp")},
    }
    world_size = parallel.tensor * parallel.pipeline
    started = distributed(world_size, write, parallel, tmp_path / "run", options, MTP)[0]
    assert set(started) == set(tensors["mtp"])
    for name, value in started.items():
        other = name.startswith(("decoder.layers.4.", "decoder.layers.5.", "mtp."))
        assert torch.equal(value, tensors["mtp" if other else "plain"][name]), name


def test_the_first_pattern_that_matches_wins_and_random_is_the_seeds_own(distributed, written, tmp_path):
    folder, tensors = written
    options = {
        "init_parts": {"decoder.layers.1.mlp.router.*": "random", "decoder.*": str(folder / "plain")},
        "seed": 9,
    }
    fresh = distributed(1, write, ParallelConfig(), tmp_path / "fresh", {"seed": 9}, {})[0]
    started = distributed(1, write, ParallelConfig(), tmp_path / "run", options, {})[0]
    for name, value in started.items():
        taken = name.startswith("decoder.") and not name.startswith("decoder.layers.1.mlp.router.")
        assert torch.equal(value, (tensors["plain"] if taken else fresh)[name]), name
    assert not torch.equal(fresh["output_layer.weight"], tensors["plain"]["output_layer.weight"])


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"init_from": "plain"}, MTP, r"plain/step_00000000: has no mtp\.\S+; 'init_parts={mtp\.\*:random}' starts"),
        (
            {"init_from": "mtp", "init_parts": {"audio_adaptor.*": "random"}},
            MTP,
            "init_parts: the pattern 'audio_adaptor.*' is the first match of no parameter",
        ),
        (
            {"init_from": "plain"},
            {"moe_intermediate_size": 28},
            "another architecture: its model.thinker.moe_intermediate_size is 24, the recipe's is 28",
        ),
        (
            {"init_parts": {"embedding.*": "plain"}},
            {"hidden_size": 64},
            r"its embedding.word_embeddings.weight is \(112, 48\), the recipe's is \(112, 64\)",
        ),
        ({"init_parts": {"decoder.*": "nowhere"}}, {}, "nowhere: no complete checkpoint here"),
    ],
    ids=["missing", "no match", "another model", "another width", "no checkpoint"],
)
def test_what_no_checkpoint_has_is_refused_in_one_line(distributed, written, tmp_path, options, changes, message):
    folder, _ = written
    place = {name: str(folder / name) for name in ("plain", "mtp", "nowhere")}
    options = dict(options)
    if "init_from" in options:
        options["init_from"] = place[options["init_from"]]
    parts = options.get("init_parts", {})
    options["init_parts"] = {pattern: place.get(source, source) for pattern, source in parts.items()}
    with pytest.raises(RankFailed, match=f"UserError: .*{message}"):
        distributed(2, write, ParallelConfig(pipeline=2), tmp_path / "run", options, changes)


def test_a_part_of_a_model_of_another_size_elsewhere_is_taken(distributed, written, tmp_path):
    folder, tensors = written
    options = {"init_parts": {"embedding.*": str(folder / "plain")}}
    changes = {"moe_intermediate_size": 28, "pattern": "GE*-", "intermediate_size": 52}
    started = distributed(2, write, ParallelConfig(tensor=2), tmp_path / "run", options, changes)[0]
    assert torch.equal(
        started["embedding.word_embeddings.weight"], tensors["plain"]["embedding.word_embeddings.weight"]
    )


@pytest.fixture(scope="module")
def hearing(distributed, tmp_path_factory):
    """A Thinker with encoders whose language model is not the others', on one rank, and its tensors."""
    folder = tmp_path_factory.mktemp("omni") / "hearing"
    changes = encoders() | {"num_experts": 4, "rope_theta": 999.0}
    return folder, distributed(1, write, ParallelConfig(), folder, {"seed": 8}, changes)[0]


def test_a_language_model_and_an_encoder_from_apart_start_an_omni_modal_model(distributed, written, hearing, tmp_path):
    (folder, tensors), (other, heard) = written, hearing
    parts = {"audio_encoder.*": str(other), "audio_*": "random", "vision_*": "random"}
    options = {"init_from": str(folder / "plain"), "init_parts": parts}
    started = distributed(2, write, ParallelConfig(tensor=2), tmp_path / "run", options, encoders())[0]
    modules = {name.partition(".")[0] for name in started}
    assert {"audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter"} < modules
    for name, value in started.items():
        if name.startswith("audio_encoder."):
            assert torch.equal(value, heard[name]), name
        elif not name.startswith(("audio_", "vision_")):
            assert torch.equal(value, tensors["plain"][name]), name


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ({}, {}, r"has no audio_adapter\.\S+; 'init_parts={audio_adapter\.\*:random,audio_encoder\.\*:random,vision_"),
        (
            {"audio_*": "hearing", "vision_*": "random"},
            {"audio_chunk_frames": 16},
            r"its model\.audio\.chunk_frames is 48, the recipe's is 16;",
        ),
        (
            {"audio_*": "hearing", "vision_*": "random"},
            {"hidden_size": 64},
            r"its audio_adapter\.\S+ is \(48,.*\), the recipe's is \(64,",
        ),
    ],
    ids=["missing", "another encoder", "another width"],
)
def test_an_encoder_that_does_not_fit_or_is_not_there_is_refused(
    distributed, written, hearing, tmp_path, parts, changes, message
):
    named = {pattern: str(hearing[0]) if source == "hearing" else source for pattern, source in parts.items()}
    options = {"init_parts": named} | ({"init_from": str(written[0] / "plain")} if not changes else {})
    audio = {name: changes[name] for name in changes if name.startswith("audio_")}
    model = {name: changes[name] for name in changes.keys() - audio}
    with pytest.raises(RankFailed, match=f"UserError: .*{message}"):
        distributed(2, write, ParallelConfig(tensor=2), tmp_path / "run", options, encoders(**audio) | model)


def audio_encoder(rank, world_size, folder):
    """Write a recognizer; the tensors of its audio encoder."""
    from omni_train import platform

    state = write_recognizer(recognizer_recipe(), Path(folder, "step_00000000"))
    platform.parallel.destroy()
    return {key: value for key, value in state.items() if key.startswith("audio_encoder.")}


@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(tensor=2)], ids=["one rank", "TP2"])
def test_a_thinker_takes_its_audio_encoder_from_a_recognizer_in_any_layout(distributed, tmp_path, parallel):
    (heard,) = distributed(1, audio_encoder, tmp_path / "aut")
    options = {"init_parts": {"audio_encoder.*": str(tmp_path / "aut" / "step_00000000")}}
    audio = {"audio": recognizer_recipe().model.audio}
    started = distributed(parallel.tensor, write, parallel, tmp_path / "run", options, audio)[0]
    taken = {key: value for key, value in started.items() if key.startswith("audio_encoder.")}
    assert taken.keys() == heard.keys()
    assert len(taken) > 10
    for name, value in heard.items():
        assert torch.equal(taken[name], value), name


def test_a_recognizer_of_another_size_is_refused_by_name(distributed, tmp_path):
    distributed(1, audio_encoder, tmp_path / "aut")
    options = {"init_parts": {"audio_encoder.*": str(tmp_path / "aut" / "step_00000000")}}
    other = {"audio": replace(recognizer_recipe().model.audio, intermediate_size=40)}
    with pytest.raises(RankFailed, match=r"its model\.audio\.intermediate_size is 36, the recipe's is 40;"):
        distributed(1, write, ParallelConfig(), tmp_path / "run", options, other)
