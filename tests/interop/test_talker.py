"""The Talker of a Qwen3-Omni's folder: imported alone and with the rest, exported, merged, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from omni_train.errors import UserError
from omni_train.interop.convert import export_checkpoint, import_checkpoint
from omni_train.interop.talker_config import talker_from_hugging_face, talker_to_hugging_face
from omni_train.recipe.schema import CheckpointConfig, CodePredictorConfig, ParallelConfig, TalkerStyle
from tests.interop.test_whole_models import QWEN3_OMNI, omni_encoders
from tests.support.conversations import CODEWORDS, qwen3_omni
from tests.support.hugging_face import rewrite, tensors_of
from tests.support.pool import RankFailed
from tests.support.talker import small_talker
from tests.support.thinker import small_recipe

DUAL_TRACK = dict(  # what a Qwen3-Omni can hold, beside the fields of `small_talker`
    style=TalkerStyle.dual_track,
    pattern="*E",
    repeats=3,
    hidden_size=28,
    partial_rotary_factor=1.0,
    mrope_section=[4, 3, 3],
    attention_output_gate=False,
    zero_centered_norm=False,
)
OMNI, TALKER, OWN = "qwen3_omni_moe", "qwen3_omni_talker", "omni_talker"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A whole Qwen3-Omni in several files."""
    folder = tmp_path_factory.mktemp("omni")
    qwen3_omni().save_pretrained(folder, max_shard_size="150KB")
    return folder


def convert(rank, world_size, steps):
    for function, arguments in steps:
        function(**arguments)


@pytest.fixture(scope="module")
def parts(distributed, original, tmp_path_factory):
    """Checkpoints of Thinker, Talker and Code2Wav of the folder, written in a layout of four ranks."""
    folder = tmp_path_factory.mktemp("parts")
    parallel = ParallelConfig(tensor=2, pipeline=2, expert=2)
    paths = {"checkpoint": folder / "thinker", "talker": folder / "talker", "code2wav": folder / "code2wav"}
    distributed(4, convert, [(import_checkpoint, dict(format=OMNI, hf=original, parallel=parallel, **paths))])
    return paths


def exported(distributed, out: Path, **arguments) -> Path:
    distributed(1, convert, [(export_checkpoint, dict(hf=out, **arguments))])
    return out


def assert_same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_all_parts_make_the_same_folder_again(distributed, original, parts, tmp_path):
    out = exported(distributed, tmp_path / "out", format=OMNI, max_file_gigabytes=1e-4, **parts)
    assert_same(tensors_of(original), tensors_of(out))
    assert (out / "config.json").read_bytes() == (original / "config.json").read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(original).keys()


def test_the_talker_s_part_of_the_folder_alone(distributed, original, parts, tmp_path):
    out = exported(distributed, tmp_path / "out", format=TALKER, checkpoint=parts["talker"])
    table = "thinker.model.embed_tokens.weight"
    mine = {n: tensor for n, tensor in tensors_of(original).items() if n.startswith("talker.") or n == table}
    assert_same(mine, tensors_of(out))
    assert (out / "config.json").read_bytes() == (original / "config.json").read_bytes()
    again = [(import_checkpoint, dict(format=TALKER, hf=out, checkpoint=tmp_path / "again"))]
    distributed(1, convert, again)


def test_stacked_experts_and_types_stay_as_released(distributed, original, tmp_path):
    folder = Path(shutil.copytree(original, tmp_path / "released"))
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(original).items()}
    for layer in range(4):
        experts = f"talker.model.layers.{layer}.mlp.experts."
        each = [[tensors.pop(f"{experts}{i}.{part}_proj.weight") for part in ("gate", "up", "down")] for i in range(6)]
        tensors[f"{experts}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        tensors[f"{experts}down_proj"] = torch.stack([down for *_, down in each])
    rewrite(folder, tensors)
    paths = dict(checkpoint=tmp_path / "thinker", talker=tmp_path / "talker")
    distributed(1, convert, [(import_checkpoint, dict(format=OMNI, hf=folder, **paths))])
    assert_same(tensors, tensors_of(exported(distributed, tmp_path / "out", format=OMNI, **paths)))


def change(rank, world_size, start, folder, of_talker):
    """A checkpoint like `start`, every parameter but the table of the text twice as large."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model, read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.models.talker import build_chunks

    recipe, start = small_talker(), resolve(start)
    model = read_model_config(start)
    recipe.model.vocab_size, recipe.model.talker = model.vocab_size, model.talker
    platform.parallel.initialize(recipe.parallel, 1)
    chunks = build_chunks(recipe)
    load_model(chunks, start, model)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if name.startswith("embedding.") != of_talker:
                parameter.mul_(2)
    model.talker.speaker_ids = {"carl": 35}
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=False), model)
    store.carry_from(start)
    store.save(1, chunks, None, {}, None)
    store.close()
    platform.parallel.destroy()


def test_after_training_the_talker_alone_is_new(distributed, original, parts, tmp_path):
    distributed(1, change, parts["talker"], tmp_path / "run", True)
    arguments = dict(format=OMNI, checkpoint=parts["checkpoint"], talker=tmp_path / "run")
    out = exported(distributed, tmp_path / "out", **arguments)
    expected = {n: 2 * t if n.startswith("talker.") else t for n, t in tensors_of(original).items()}
    assert_same(expected, tensors_of(out))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, out))
    assert after["talker_config"].pop("speaker_id") == {"carl": 35}
    assert before["talker_config"].pop("speaker_id") == {"anna": 33, "ben": 34}
    assert {k: v for k, v in before["talker_config"].items() if k not in ("text_config", "code_predictor_config")} == {
        k: v for k, v in after["talker_config"].items() if k not in ("text_config", "code_predictor_config")
    }
    for key in ("thinker_config", "code2wav_config"):
        assert before[key] == after[key]


def test_a_talker_of_another_thinker_is_refused(distributed, parts, tmp_path):
    distributed(1, change, parts["talker"], tmp_path / "run", False)
    arguments = dict(format=OMNI, checkpoint=parts["checkpoint"], talker=tmp_path / "run", hf=tmp_path / "out")
    with pytest.raises(RankFailed, match=r"its table of the text is not that of .*; give the Thinker"):
        distributed(1, convert, [(export_checkpoint, arguments)])


def save_random(rank, world_size, folder, thinker, changes):
    """Checkpoints of random networks: a Talker, and below it a Thinker whose table of the text it has."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models import talker as talkers
    from omni_train.models import thinker as thinkers
    from omni_train.recipe.networks import held

    recipe, below = small_talker(**changes), small_recipe(**thinker)
    platform.parallel.initialize(recipe.parallel, 1)
    (speaks,), (thinks,) = talkers.build_chunks(recipe), thinkers.build_chunks(below)
    speaks.embedding.load_state_dict(thinks.embedding.state_dict(), strict=False)
    for name, model, network in (("talker", held(recipe), speaks), ("thinker", below.model, thinks)):
        store = CheckpointStore(folder / name, CheckpointConfig(asynchronous=False), model)
        store.save(0, [network], None, {}, None)
        store.close()
    platform.parallel.destroy()


def test_a_qwen3_omni_of_our_own_opens_in_transformers(distributed, original, parts, tmp_path):
    """Thinker and Talker never came from a folder."""
    import transformers

    changes = DUAL_TRACK | dict(codebook_size=CODEWORDS, codec_vocab_size=50, codec_pad_id=30, codec_bos_id=31)
    ids = {f"codec_{name}_id": 40 + i for i, name in enumerate(("eos", "text", "nothink", "think_bos", "think_eos"))}
    ids["speaker_ids"] = {"anna": 45, "ben": 46}
    distributed(1, save_random, tmp_path, QWEN3_OMNI | omni_encoders(), changes | ids)
    arguments = dict(format=OMNI, checkpoint=tmp_path / "thinker", talker=tmp_path / "talker")
    with pytest.raises(RankFailed, match="code2wav= is missing: a Qwen3-Omni that speaks has a Talker and a Code2Wav"):
        exported(distributed, tmp_path / "half", **arguments)
    out = exported(distributed, tmp_path / "out", **arguments, code2wav=parts["code2wav"])
    kind = transformers.Qwen3OmniMoeForConditionalGeneration
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.talker.config.audio_token_id == 151675 and model.talker.config.speaker_id == {"anna": 45, "ben": 46}
    model.save_pretrained(tmp_path / "theirs")
    assert_same(tensors_of(out), tensors_of(tmp_path / "theirs"))
    steps = [(import_checkpoint, dict(format=TALKER, hf=tmp_path / "theirs", checkpoint=tmp_path / "again"))]
    steps += [(export_checkpoint, dict(format=TALKER, hf=tmp_path / "more", checkpoint=tmp_path / "again"))]
    steps += [(export_checkpoint, dict(format=TALKER, hf=tmp_path / "alone", checkpoint=tmp_path / "talker"))]
    distributed(1, convert, steps)
    assert_same(tensors_of(tmp_path / "alone"), tensors_of(tmp_path / "more"))


def test_code2wav_of_other_codes_is_refused(distributed, parts, tmp_path):
    distributed(1, save_random, tmp_path, QWEN3_OMNI | omni_encoders(), DUAL_TRACK)
    arguments = dict(format=OMNI, checkpoint=tmp_path / "thinker", talker=tmp_path / "talker")
    with pytest.raises(RankFailed, match="code2wav=5 codebooks of 23, the Talker has 5 of 11"):
        exported(distributed, tmp_path / "out", **arguments, code2wav=parts["code2wav"])


def test_a_talker_of_any_kind_goes_out_and_comes_in_under_our_names(distributed, tmp_path):
    distributed(1, save_random, tmp_path, {}, {})
    out = exported(distributed, tmp_path / "out", format=OWN, checkpoint=tmp_path / "talker")
    arguments = dict(format=OWN, hf=out, checkpoint=tmp_path / "again")
    distributed(2, convert, [(import_checkpoint, arguments | {"parallel": ParallelConfig(tensor=2)})])
    once_more = exported(distributed, tmp_path / "more", format=OWN, checkpoint=tmp_path / "again")
    assert_same(tensors_of(out), tensors_of(once_more))
    assert {"code_predictor.input_projection.bias", "text_projection.linear_fc2.bias"} <= tensors_of(out).keys()
    assert (out / "config.json").read_bytes() == (once_more / "config.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "omni_train_talker" and config["talker"]["style"] == "interleaved"


def refused(folder: Path, tmp_path: Path, message: str, format: str = TALKER) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(format, folder, tmp_path / "checkpoint")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("", {"num_code_groups": None}, r"talker_config\.num_code_groups is missing"),
        ("", {"tie_word_embeddings": True}, r"talker_config\.tie_word_embeddings=True: must be False"),
        ("text_config", {"norm_topk_prob": False}, r"text_config\.norm_topk_prob=False: must be True"),
        ("text_config", {"norm_topk_prob": None}, r"text_config\.norm_topk_prob is missing"),
        ("text_config", {"model_type": "llama"}, r"text_config\.model_type=llama: must be qwen3_omni_moe_talker_text"),
        ("text_config", {"hidden_act": "gelu"}, r"text_config\.hidden_act=gelu: must be silu"),
        ("text_config", {"vocab_size": 30}, r"text_config\.vocab_size=30: leaves no control code free"),
        ("code_predictor_config", {"num_code_groups": 4}, r"code_predictor_config\.num_code_groups=4: must be 5"),
        ("code_predictor_config", {"hidden_size": 28}, r"code_predictor_config\.hidden_size=28: must be 32"),
        (
            "code_predictor_config",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"code_predictor_config\.layer_types=",
        ),
    ],
)
def test_a_configuration_that_would_change_the_numbers_is_named(original, part, changes, message):
    config = json.loads((original / "config.json").read_text())
    (config["talker_config"][part] if part else config["talker_config"]).update(changes)
    if changes.get("vocab_size"):
        config["talker_config"]["speaker_id"] = {"anna": 23}
    with pytest.raises(UserError, match=message):
        talker_from_hugging_face(config, "")


def test_tensors_too_many_and_too_few_are_named(original, tmp_path):
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    tensors = tensors_of(folder)
    rewrite(folder, tensors | {"talker.model.norm.bias": torch.zeros(32)})
    refused(folder, tmp_path, r"talker\.model\.norm\.bias: nothing in this model corresponds to it")
    lacking = {name: tensor for name, tensor in tensors.items() if name != "talker.code_predictor.lm_head.2.weight"}
    rewrite(folder, lacking)
    refused(folder, tmp_path, r"talker\.code_predictor\.lm_head\.2\.weight: the model needs it")
    rewrite(folder, tensors | {"talker.code_predictor.lm_head.2.weight": torch.zeros(22, 32)})
    refused(folder, tmp_path, r"lm_head\.2\.weight has shape \(22, 32\), but config\.json makes it 23 rows")
    refused(folder, tmp_path, r"model_type=qwen3_omni_moe; format=omni_talker reads omni_train_talker", OWN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "talker.style=interleaved: must be dual_track in a Qwen3-Omni; use format=omni_talker"),
        ({"style": TalkerStyle.dual_track}, "talker.partial_rotary_factor=0.6: must be 1.0"),
        (DUAL_TRACK | {"pattern": "GE*E"}, r"talker.pattern=GE\*E: must be \*E"),
        (DUAL_TRACK | {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0: must be above 0"),
        (DUAL_TRACK | {"hidden_size": 32}, r"talker.code_predictor.hidden_size=28: must be 32"),
    ],
)
def test_a_talker_that_no_qwen3_omni_can_hold_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        talker_to_hugging_face(small_talker(**changes).model)


def test_the_released_configuration_is_read_as_it_is():
    """As far as it says how numbers are computed; values are those of Qwen3-Omni-30B-A3B-Instruct's config.json."""
    text = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=16, head_dim=128)
    text |= dict(num_key_value_heads=2, num_experts=128, num_experts_per_tok=6, moe_intermediate_size=384)
    text |= dict(shared_expert_intermediate_size=768, norm_topk_prob=True, vocab_size=3072, rms_norm_eps=1e-6)
    text |= dict(router_aux_loss_coef=0.001, max_position_embeddings=65536, rope_theta=1000000, hidden_act="silu")
    text["rope_scaling"] = {"interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    predictor = dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=5, num_attention_heads=16)
    predictor |= dict(num_key_value_heads=8, head_dim=128, vocab_size=2048, num_code_groups=16, rms_norm_eps=1e-6)
    predictor |= dict(rope_theta=1000000, rope_scaling=None, sliding_window=None, layer_types=["full_attention"] * 5)
    config = dict(num_code_groups=16, thinker_hidden_size=2048, accept_hidden_layer=24, codec_pad_id=2148)
    config |= dict(codec_bos_id=2149, codec_eos_token_id=2150, codec_nothink_id=2155, codec_think_bos_id=2156)
    config |= dict(codec_think_eos_id=2157, speaker_id={"chelsie": 2301, "ethan": 2302, "aiden": 2303})
    config |= dict(text_config=text, code_predictor_config=predictor)
    thinker = {"text_config": {"vocab_size": 152064}}
    model = talker_from_hugging_face({"thinker_config": thinker, "talker_config": config}, "x")
    talker = model.talker
    assert talker.router_aux_loss_coef == pytest.approx(0.006) and talker.codec_text_id == 2151
    assert (talker.pattern, talker.repeats, talker.mrope_section) == ("*E", 20, [24, 20, 20])
    assert talker.code_predictor == CodePredictorConfig()
    back = talker_to_hugging_face(model)
    assert {k: back["text_config"][k] for k in text if not k.startswith("rope")} == {
        k: v for k, v in text.items() if not k.startswith("rope")
    }
    assert talker_from_hugging_face({"thinker_config": thinker, "talker_config": back}, "x") == model
