"""Folders of models that hear, see and speak: what is read, what travels, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_train.errors import UserError
from omni_train.interop.config import from_hugging_face, to_hugging_face
from omni_train.interop.convert import export_checkpoint, import_checkpoint
from omni_train.recipe.compose import load_recipe
from omni_train.recipe.schema import CheckpointConfig
from tests.support.conversations import qwen3_5, qwen3_omni
from tests.support.hugging_face import tensors_of
from tests.support.thinker import encoders, small_recipe

OMNI = "qwen3_omni_moe"
QWEN3_OMNI = dict(  # beside the fields of `encoders`
    pattern="*E*E",
    head_dim=12,
    partial_rotary_factor=1.0,
    attention_output_gate=False,
    zero_centered_norm=False,
    shared_expert_intermediate_size=0,
    num_experts=6,
)


def omni_encoders() -> dict:
    return encoders(audio_num_convolutions=3, vision_deepstack_visual_indexes=[0, 1])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A whole Qwen3-Omni in several files, a part of it in types that no model here has."""
    folder = tmp_path_factory.mktemp("omni")
    qwen3_omni().save_pretrained(folder, max_shard_size="150KB")
    extra = {
        "talker.half": torch.arange(5).half(),
        "code2wav.codes": torch.arange(7),
        "talker.nothing": torch.zeros(0, 3),
        "talker.scale": torch.tensor(3.0),
    }
    save_file(extra, folder / "model-extra.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def copy(original, tmp_path):
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def convert(rank, world_size, steps):
    for function, arguments in steps:
        function(*arguments)


def edit_config(folder: Path, part: list[str], **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    section = config
    for key in part:
        section = section[key]
    section.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_folder(before: Path, after: Path) -> None:
    theirs, ours = tensors_of(before), tensors_of(after)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and tensor.shape == ours[name].shape, name
        assert torch.equal(tensor, ours[name]), name


def test_talker_and_code2wav_travel_whatever_their_types(distributed, original, tmp_path):
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    distributed(1, convert, [(import_checkpoint, (OMNI, original, checkpoint))])
    distributed(2, convert, [(export_checkpoint, (OMNI, out, checkpoint, 1e-4))])
    assert_same_folder(original, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    assert index["weight_map"] == {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert (out / "config.json").read_bytes() == (original / "config.json").read_bytes()


def train(rank, world_size, start, run):
    """The checkpoint of a step that changed nothing but the model's length."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model, read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.models.thinker import build_chunks

    recipe, start = small_recipe(), resolve(start)
    recipe.model = read_model_config(start)
    recipe.model.thinker.max_position_embeddings = 4096
    platform.parallel.initialize(recipe.parallel, 1)
    chunks = build_chunks(recipe)
    load_model(chunks, start, recipe.model)
    store = CheckpointStore(run, CheckpointConfig(asynchronous=False), recipe.model)
    store.carry_from(start)
    store.save(1, chunks, None, {}, None)
    store.close()


def test_after_training_only_what_has_changed_is_new_in_the_configuration(distributed, original, tmp_path):
    distributed(1, convert, [(import_checkpoint, (OMNI, original, tmp_path / "imported"))])
    distributed(1, train, tmp_path / "imported", tmp_path / "run")
    distributed(1, convert, [(export_checkpoint, (OMNI, tmp_path / "out", tmp_path / "run"))])
    assert_same_folder(original, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "out"))
    assert after["thinker_config"]["text_config"]["max_position_embeddings"] == 4096
    assert after["talker_config"] == before["talker_config"] and after["code2wav_config"] == before["code2wav_config"]
    for section in ("audio_config", "vision_config"):
        assert after["thinker_config"][section] == before["thinker_config"][section]


def save_random(rank, world_size, folder, changes):
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(**changes)
    platform.parallel.initialize(recipe.parallel, 1)
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, build_chunks(recipe), None, {}, None)
    store.close()


@pytest.mark.parametrize(
    ("format", "changes", "opens"),
    [
        ("qwen3_5_moe", lambda: {"vision": encoders()["vision"]}, "AutoModelForImageTextToText"),
        (
            "qwen3_5",
            lambda: dict(vision=encoders()["vision"], pattern="G-*-", num_experts=0, intermediate_size=52),
            "AutoModelForImageTextToText",
        ),
        (OMNI, lambda: QWEN3_OMNI | omni_encoders(), "Qwen3OmniMoeForConditionalGeneration"),
    ],
)
def test_a_model_of_our_own_opens_in_transformers(distributed, tmp_path, format, changes, opens):
    import transformers

    distributed(1, save_random, tmp_path / "ours", changes())
    distributed(1, convert, [(export_checkpoint, (format, tmp_path / "out", tmp_path / "ours"))])
    model, report = getattr(transformers, opens).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(model).__name__ == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    model.save_pretrained(tmp_path / "theirs")
    assert_same_folder(tmp_path / "out", tmp_path / "theirs")
    again = [(import_checkpoint, (format, tmp_path / "theirs", tmp_path / "again"))]
    distributed(1, convert, [*again, (export_checkpoint, (format, tmp_path / "once_more", tmp_path / "again"))])
    assert_same_folder(tmp_path / "out", tmp_path / "once_more")


def test_a_folder_without_its_vision_tensors_gives_a_language_model(tmp_path, distributed):
    folder = tmp_path / "hf"
    qwen3_5("qwen3_5_moe").save_pretrained(folder)
    text = {name: tensor for name, tensor in tensors_of(folder).items() if not name.startswith("model.visual.")}
    save_file(text, folder / "model.safetensors")
    steps = [(import_checkpoint, ("qwen3_5_moe", folder, tmp_path / "checkpoint"))]
    distributed(1, convert, [*steps, (export_checkpoint, ("qwen3_5_moe", tmp_path / "out", tmp_path / "checkpoint"))])
    assert_same_folder(folder, tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_the_recipe_is_the_released_configuration():
    """As far as it says how numbers are computed."""
    model = load_recipe(["model=qwen3_omni_30b_a3b"]).model
    config = to_hugging_face(OMNI, model, whole=True)["thinker_config"]
    text = config["text_config"]
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["num_key_value_heads"]) == (48, 32, 4)
    assert text["rope_parameters"] | {"rope_theta": 1e6, "mrope_section": [24, 20, 20]} == text["rope_parameters"]
    released = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, n_window=50)
    released |= dict(n_window_infer=800, downsample_hidden_size=480, num_mel_bins=128, output_dim=2048)
    assert config["audio_config"] == released
    released = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16)
    released |= dict(temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=2304, out_hidden_size=2048)
    assert config["vision_config"] == released | dict(deepstack_visual_indexes=[8, 16, 24])
    # And back: what is read is the recipe again.
    read = from_hugging_face(OMNI, {"thinker_config": config}, model.name, ())
    assert read == model


def refused(folder: Path, tmp_path: Path, message: str, format: str = OMNI) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(format, folder, tmp_path / "checkpoint")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("audio_config", {"activation_function": "relu"}, r"audio_config\.activation_function=relu: must be gelu"),
        ("audio_config", {"n_window_infer": 250}, r"n_window_infer=250: must be a multiple of 2·n_window=100"),
        ("audio_config", {"output_dim": 41}, r"audio_config\.output_dim=41: must be 40"),
        ("audio_config", {"d_model": None}, r"audio_config\.d_model is missing"),
        ("vision_config", {"hidden_act": "gelu"}, r"vision_config\.hidden_act=gelu: must be gelu_pytorch_tanh"),
        ("vision_config", {"patch_size": [4, 4]}, r"vision_config\.patch_size=\[4, 4\]: must be one number"),
        ("vision_config", {"deepstack_visual_indexes": [2, 0]}, r"deepstack_visual_indexes=\[2, 0\]: must be rising"),
        ("vision_config", {"out_hidden_size": 48}, r"vision_config\.out_hidden_size=48: must be 40"),
        ("text_config", {"norm_topk_prob": False}, "norm_topk_prob=False: must be True"),
        ("text_config", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8: must be 0"),
        ("text_config", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
    ],
)
def test_a_configuration_that_would_change_the_numbers_is_named(copy, tmp_path, part, changes, message):
    edit_config(copy, ["thinker_config", part], **changes)
    refused(copy, tmp_path, message)


def test_tensors_too_many_and_too_few_in_the_thinker_are_named(copy, tmp_path):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    file = copy / index["weight_map"]["thinker.audio_tower.ln_post.bias"]
    tensors = load_file(file)
    tensors["thinker.audio_tower.ln_pre.bias"] = tensors.pop("thinker.audio_tower.ln_post.bias")
    save_file(tensors, file)
    refused(copy, tmp_path, r"thinker\.audio_tower\.ln_pre\.bias: nothing in this model corresponds to it")
    del tensors["thinker.audio_tower.ln_pre.bias"]
    save_file(tensors, file)
    refused(copy, tmp_path, r"thinker\.audio_tower\.ln_post\.bias: the model needs it")


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("qwen3_5_moe", encoders, "model.audio: must be null with format=qwen3_5_moe"),
        (OMNI, encoders, r"model\.thinker\.pattern=GEGE"),
        (OMNI, lambda: QWEN3_OMNI, "must have an audio and a vision encoder with format=qwen3_omni_moe"),
        (OMNI, lambda: QWEN3_OMNI | encoders() | {"zero_centered_norm": True}, "zero_centered_norm=True"),
        (OMNI, lambda: QWEN3_OMNI | encoders(), "model.audio.num_convolutions=4: the format needs 3"),
        (
            "qwen3_5_moe",
            lambda: {"attention_output_gate": False},
            "attention_output_gate=False: must be True with format=qwen3_5_moe",
        ),
        (
            "qwen3_5_moe",
            lambda: {"vision": omni_encoders()["vision"]},
            r"deepstack_visual_indexes=\[0, 1\]: must be \[\] in this format",
        ),
    ],
)
def test_a_model_that_a_format_cannot_express_is_refused(format, changes, message):
    with pytest.raises(UserError, match=message):
        to_hugging_face(format, small_recipe(**changes()).model, whole=True)
