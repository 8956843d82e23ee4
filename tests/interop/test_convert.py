"""Folders in and out: what travels, in which types and layouts, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from omni_train.errors import UserError
from omni_train.interop.convert import export_checkpoint, import_checkpoint
from omni_train.interop.folder import Folder
from omni_train.locks import DirectoryLock
from omni_train.recipe.schema import CheckpointConfig, ParallelConfig, Precision
from tests.support.hugging_face import rewrite, small_model, tensors_of, with_mtp
from tests.support.thinker import small_recipe

MOE = "qwen3_5_moe"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder as `save_pretrained` writes it, in several files, with a tokenizer's files beside it."""
    folder = tmp_path_factory.mktemp("original")
    small_model(MOE).save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not carried")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def copy(original, tmp_path):
    """A copy of the folder, to be spoiled."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def convert(rank, world_size, steps):
    """Run import and export steps, (function, arguments), one after the other."""
    for function, arguments in steps:
        function(*arguments)


def there_and_back(distributed, folder: Path, tmp_path: Path, format=MOE, world_size=1, parallel=None, **options):
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    steps = [
        (import_checkpoint, (format, folder, checkpoint, parallel)),
        (export_checkpoint, (format, out, checkpoint)),
    ]
    distributed(world_size, convert, steps)
    return out


def assert_same_tensors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with the experts of each layer but the prediction layer in two tensors, as Qwen3.5 was released."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name or name.startswith("mtp.")}
    for layer in range(4):
        names = [f"model.layers.{layer}.mlp.experts.{i}." for i in range(8)]
        gate_up = [torch.cat([tensors[n + "gate_proj.weight"], tensors[n + "up_proj.weight"]]) for n in names]
        out[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        out[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(
            [tensors[n + "down_proj.weight"] for n in names]
        )
    return out


def test_everything_that_describes_the_model_travels(distributed, original, tmp_path):
    out = there_and_back(distributed, original, tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (original / name).read_bytes()
    assert {file.suffix for file in out.iterdir()} == {".json", ".jinja", ".safetensors"}
    assert not (out / "tensors.json").exists()


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, expert_tensor=2, pipeline=2),
        ParallelConfig(tensor=2, expert=4),
        ParallelConfig(pipeline=2, virtual_pipeline=2, expert=2),
    ],
)
def test_no_layout_changes_a_bit(distributed, original, tmp_path, parallel):
    out = there_and_back(distributed, original, tmp_path, world_size=4, parallel=parallel)
    assert_same_tensors(tensors_of(original), tensors_of(out))


def test_a_released_folder_keeps_its_names_types_and_shapes(distributed, copy, tmp_path):
    """bf16 with fp32 decays, stacked experts, the multimodal prefix and configuration, multi-token prediction."""
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        if "A_log" in name
        else tensor.bfloat16()
        for name, tensor in stacked(with_mtp(tensors_of(copy))).items()
    }
    rewrite(copy, tensors)
    text = json.loads((copy / "config.json").read_text()) | {"mtp_num_hidden_layers": 1, "dtype": "bfloat16"}
    (copy / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": text}))
    out = there_and_back(distributed, copy, tmp_path, world_size=4, parallel=ParallelConfig(pipeline=2, tensor=2))
    assert_same_tensors(tensors, tensors_of(out))
    assert (out / "config.json").read_bytes() == (copy / "config.json").read_bytes()


def test_a_tied_dense_model_with_multi_token_prediction_over_two_stages(distributed, tmp_path):
    folder = tmp_path / "dense"
    small_model("qwen3_5").save_pretrained(folder)
    rewrite(folder, with_mtp(tensors_of(folder)))
    out = there_and_back(distributed, folder, tmp_path, "qwen3_5", world_size=2, parallel=ParallelConfig(pipeline=2))
    assert_same_tensors(tensors_of(folder), tensors_of(out))


def load_in(rank, world_size, checkpoint, precision):
    """The checkpoint's parameters in a model of another precision, as one sum per parameter."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import load_model, read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(precision=precision)
    checkpoint = resolve(checkpoint)
    recipe.model = read_model_config(checkpoint)
    platform.parallel.initialize(recipe.parallel, 1)
    chunks = build_chunks(recipe)
    load_model(chunks, checkpoint, recipe.model)
    return {name: parameter.detach() for name, parameter in chunks[0].named_parameters()}


def test_a_checkpoint_of_one_precision_starts_a_run_of_the_other(distributed, copy, tmp_path):
    loaded = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        folder = Path(shutil.copytree(copy, tmp_path / name))
        rounded = {key: tensor.bfloat16().to(dtype) for key, tensor in tensors_of(copy).items()}
        decays = {key: tensor for key, tensor in tensors_of(copy).items() if "A_log" in key}
        rewrite(folder, rounded | decays)
        distributed(1, convert, [(import_checkpoint, (MOE, folder, tmp_path / f"{name}.checkpoint", None))])
        for precision in Precision:
            loaded[name, precision] = distributed(1, load_in, tmp_path / f"{name}.checkpoint", precision)[0]
    for precision, dtype in ((Precision.fp32, torch.float32), (Precision.bf16, torch.bfloat16)):
        for name, parameter in loaded["fp32", precision].items():
            kept = name.endswith(("A_log", "out_norm.weight"))
            assert parameter.dtype == (torch.float32 if kept else dtype), name
            assert torch.equal(parameter, loaded["bf16", precision][name]), name
    decays = [value for name, value in loaded["bf16", Precision.bf16].items() if name.endswith("A_log")]
    assert decays and all(
        any(torch.equal(decay, theirs) for theirs in tensors_of(copy).values()) for decay in decays
    )  # to the last bit


def train_from(rank, world_size, imported, run):
    """Checkpoints of three steps of a run that started from an import, only the last of them kept."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore, load_model, read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.models.thinker import build_chunks

    recipe, start = small_recipe(), resolve(imported)
    recipe.model = read_model_config(start)
    recipe.model.thinker.max_position_embeddings = 1024
    platform.parallel.initialize(recipe.parallel, 1)
    chunks = build_chunks(recipe)
    load_model(chunks, start, recipe.model)
    store = CheckpointStore(run, CheckpointConfig(asynchronous=False, keep=1), recipe.model)
    store.carry_from(start)
    for step in (1, 2, 3):
        store.save(step, chunks, None, {}, None)
    store.close()


def test_the_tokenizer_goes_on_with_the_checkpoints_of_a_run(distributed, original, tmp_path):
    distributed(1, convert, [(import_checkpoint, (MOE, original, tmp_path / "imported", None))])
    distributed(1, train_from, tmp_path / "imported", tmp_path / "run")
    distributed(1, convert, [(export_checkpoint, (MOE, tmp_path / "out", tmp_path / "run"))])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", original))
    assert config == before | {"max_position_embeddings": 1024, "mtp_num_hidden_layers": 0}
    assert_same_tensors(tensors_of(original), tensors_of(tmp_path / "out"))


def save_random(rank, world_size, folder, changes):
    from omni_train import platform
    from omni_train.checkpoint.sharded import CheckpointStore
    from omni_train.models.thinker import build_chunks

    recipe = small_recipe(**changes)
    platform.parallel.initialize(recipe.parallel, 1)
    store = CheckpointStore(folder, CheckpointConfig(asynchronous=False), recipe.model)
    store.save(0, build_chunks(recipe), None, {}, None)
    store.close()


@pytest.mark.parametrize("format", [MOE, "qwen3_5"])
def test_a_model_of_our_own_opens_in_transformers(distributed, tmp_path, format):
    import transformers

    changes = {} if format == MOE else dict(pattern="G-*-", num_experts=0, intermediate_size=52)
    distributed(1, save_random, tmp_path / "ours", changes)
    distributed(1, convert, [(export_checkpoint, (format, tmp_path / "out", tmp_path / "ours"))])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(model).__name__ == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    model.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "theirs"))
    assert there_and_back(distributed, tmp_path / "theirs", tmp_path / "again", format)


def share_export(rank, world_size, checkpoint, hf):
    export_checkpoint(MOE, hf, checkpoint, max_file_gigabytes=1e-4)


def test_ranks_share_the_files_of_an_export(distributed, original, tmp_path):
    distributed(1, convert, [(import_checkpoint, (MOE, original, tmp_path / "checkpoint", None))])
    distributed(3, share_export, tmp_path / "checkpoint", tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert set(json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"].values()) == set(
        files
    )
    assert_same_tensors(tensors_of(original), tensors_of(tmp_path / "out"))
    large = [file for file in (tmp_path / "out").glob("*.safetensors") if file.stat().st_size > 1.2e5]
    assert not large


def refused(folder: Path, tmp_path: Path, message: str, format: str = MOE) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(format, folder, tmp_path / "checkpoint")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "checkpoint").exists()


def test_a_left_over_tensor_is_named(copy, tmp_path):
    rewrite(copy, tensors_of(copy) | {"model.layers.4.input_layernorm.weight": torch.ones(2)})
    refused(copy, tmp_path, r"model\.layers\.4\.input_layernorm\.weight: nothing in this model corresponds")


@pytest.mark.parametrize("whole", [True, False])
def test_a_tied_head_that_is_written_out_is_read_if_it_is_the_embedding(distributed, tmp_path, whole):
    folder = tmp_path / "dense"
    small_model("qwen3_5").save_pretrained(folder)
    tied = tensors_of(folder)
    if whole:
        tied = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tied.items()}
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    (embedding,) = (name for name in tied if "embed_tokens" in name)
    rewrite(folder, tied | {"lm_head.weight": tied[embedding].clone()})
    out = there_and_back(distributed, folder, tmp_path, format="qwen3_5")
    assert_same_tensors(tied, tensors_of(out))
    other = tied[embedding].clone()
    other[-1, -1] += 1
    rewrite(folder, tied | {"lm_head.weight": other})
    with pytest.raises(UserError, match=rf"lm_head\.weight is not {embedding}, to which config.json ties it"):
        import_checkpoint("qwen3_5", folder, tmp_path / "another")


def test_a_tensor_in_two_files_is_read_if_both_say_the_same(copy, tmp_path):
    tensors = tensors_of(copy)
    (copy / "model.safetensors.index.json").unlink()
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({name: tensors[name].clone()}, copy / "twice.safetensors")
    assert set(Folder(copy).names) == tensors.keys()
    save_file({name: tensors[name] + 1}, copy / "twice.safetensors")
    refused(copy, tmp_path, rf"twice\.safetensors: {name} is in another file of the folder too, with other values")


def test_a_configuration_may_begin_with_a_byte_order_mark(copy):
    plain = Folder(copy).config
    (copy / "config.json").write_bytes(b"\xef\xbb\xbf" + (copy / "config.json").read_bytes())
    assert Folder(copy).config == plain


def test_a_missing_tensor_is_named(copy, tmp_path):
    tensors = tensors_of(copy)
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    rewrite(copy, tensors)
    refused(copy, tmp_path, r"model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight: the model needs it")


def test_a_tensor_with_other_rows_is_named(copy, tmp_path):
    tensors = tensors_of(copy)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(39, 40)
    rewrite(copy, tensors)
    refused(copy, tmp_path, r"model\.layers\.1\.self_attn\.k_proj\.weight has shape \(39, 40\)")


def test_a_tensor_with_other_columns_is_named(distributed, copy, tmp_path):
    from tests.support.pool import RankFailed

    tensors = tensors_of(copy)
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(40, 39)
    rewrite(copy, tensors)
    with pytest.raises(
        RankFailed, match=r"UserError: .*model\.layers\.1\.self_attn\.k_proj\.weight has shape \(40, 39\)"
    ):
        distributed(1, convert, [(import_checkpoint, (MOE, copy, tmp_path / "checkpoint", None))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True: must be False"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: must be silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type=yarn: must be default"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"model_type": "qwen3_next"}, "model_type=qwen3_next"),
        ({"num_attention_heads": 5}, "num_attention_heads|q_proj"),
    ],
)
def test_a_configuration_that_would_change_the_numbers_is_named(copy, tmp_path, changes, message):
    edit_config(copy, **changes)
    refused(copy, tmp_path, message)


def test_another_format_is_named(original, tmp_path):
    refused(original, tmp_path, "model_type=qwen3_5_moe_text; format=qwen3_5 reads qwen3_5_text", format="qwen3_5")
    refused(original, tmp_path, "format=llama: unknown; choose one of qwen3_5_moe, qwen3_5", format="llama")


def test_damaged_folders_are_refused(copy, tmp_path):
    refused(tmp_path, tmp_path, "config.json: there is no such file")
    file = sorted(copy.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(copy, tmp_path, f"{file.name}: not a complete safetensors file")
    file.unlink()
    refused(copy, tmp_path, f"{file.name}: there is no such file, and model.safetensors.index.json names it")
    (copy / "model.safetensors.index.json").write_text("{}")
    refused(copy, tmp_path, r"index\.json: no weight_map in it")
    (copy / "config.json").write_text("{")
    refused(copy, tmp_path, "config.json: not valid JSON")


def test_nothing_is_overwritten(distributed, original, tmp_path):
    distributed(1, convert, [(import_checkpoint, (MOE, original, tmp_path / "checkpoint", None))])
    (tmp_path / "checkpoint" / "latest").unlink()  # as in a copy without links
    with pytest.raises(UserError, match="there is a checkpoint already"):
        import_checkpoint(MOE, original, tmp_path / "checkpoint")
    with pytest.raises(UserError, match="there are safetensors files already"):
        export_checkpoint(MOE, original, tmp_path / "checkpoint")


def test_a_checkpoint_that_is_cut_and_has_no_digests_is_one_line(distributed, original, tmp_path):
    distributed(1, convert, [(import_checkpoint, (MOE, original, tmp_path / "checkpoint", None))])
    (step,) = (tmp_path / "checkpoint").glob("step_*")
    (step / "digests.json").unlink()
    for shard in step.glob("*.distcp"):
        os.truncate(shard, shard.stat().st_size // 9)
    with pytest.raises(UserError, match=r"step_00000000: damaged: \S+ cannot be read: [^\n]*; use another"):
        export_checkpoint(MOE, tmp_path / "out", step)


def test_what_another_command_is_writing_is_left_to_it(distributed, copy, tmp_path):
    from tests.support.pool import RankFailed

    with DirectoryLock(tmp_path / "checkpoint", remedy=""):
        with pytest.raises(RankFailed, match=r"checkpoint: process .* is at work here; .* or choose another folder"):
            distributed(1, convert, [(import_checkpoint, (MOE, copy, tmp_path / "checkpoint", None))])
        assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [".lock"]


def test_an_export_to_another_family_is_refused(distributed, tmp_path):
    from tests.support.pool import RankFailed

    distributed(1, save_random, tmp_path / "ours", {})
    with pytest.raises(RankFailed, match=r"UserError: model\.thinker\.pattern=GEGE"):
        distributed(1, convert, [(export_checkpoint, ("qwen3_5", tmp_path / "out", tmp_path / "ours"))])
    assert not (tmp_path / "out").exists()
