"""A random Qwen3.5 of transformers, imported, computes what it computes, and comes out again bit by bit."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omni_train.data.rows.batch import IGNORE, PackedBatch
from omni_train.recipe.schema import ParallelConfig
from tests.support.hugging_face import SIZES, rewrite, small_model, tensors_of, with_mtp
from tests.support.imported import export, gradients_of, import_and_run
from tests.support.thinker import random_row

FORMATS = ["qwen3_5_moe", "qwen3_5"]
LAYOUTS = {
    "1": (1, dict()),
    "TP2-EP2-PP2": (4, dict(tensor=2, expert=2, pipeline=2)),  # without EP2 for the dense model
}
ROW_TOKENS = 96
SAMPLES = [37, 1, 29]  # tokens; each padded to a multiple of 8 in the row


def packed_row(multimodal: bool) -> PackedBatch:
    """A row of three samples; with `multimodal` the ids of height and width differ from those of time."""
    row = random_row(SAMPLES, ROW_TOKENS, seed=3, vocab=SIZES["vocab_size"])
    if not multimodal:
        return row
    generator = torch.Generator().manual_seed(8)
    ids = row.position_ids + torch.randint(9, row.position_ids.shape, generator=generator)
    return dataclasses.replace(row, position_ids=ids)


def reference(model, row: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers on each sample alone: logits of the real tokens, and the mean loss over the row."""
    logits, loss = [], 0.0
    for start, length in zip(row.cu_seqlens.tolist(), SAMPLES, strict=False):
        mine = slice(start, start + length)
        out = model(row.tokens[mine][None], position_ids=row.position_ids[:, None, mine]).logits[0]
        logits.append(out)
        loss = loss + F.cross_entropy(out, row.labels[mine], ignore_index=IGNORE, reduction="sum")
    return torch.cat(logits), loss / row.num_loss_tokens


@pytest.fixture(scope="module", params=FORMATS)
def original(request, tmp_path_factory):
    """The format, the model, and its folder."""
    model = small_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture(scope="module", params=LAYOUTS)
def imported(request, original, distributed, tmp_path_factory):
    """The folder of what `import_and_run` wrote in a layout, with what it returned."""
    format, _, hf = original
    world_size, ways = LAYOUTS[request.param]
    parallel = ParallelConfig(**ways)
    if format == "qwen3_5":
        parallel.expert = 1
    folder = tmp_path_factory.mktemp("imported")
    rows = [packed_row(multimodal=False), packed_row(multimodal=True)]
    return folder, distributed(world_size, import_and_run, format, hf, folder, parallel, rows)


def test_logits_are_the_reference_s_of_each_sample_alone(original, imported):
    _, model, _ = original
    _, results = imported
    for row, logits in enumerate(next(logits for _, logits in results if logits is not None)):
        with torch.no_grad():
            expected, _ = reference(model, packed_row(multimodal=row == 1))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_reference_s(original, imported, distributed, tmp_path):
    format, model, _ = original
    folder, results = imported
    model.zero_grad()
    _, loss = reference(model, packed_row(multimodal=False))
    loss.backward()
    for metrics, _ in results:
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    distributed(1, export, format, tmp_path / "ours", folder / "gradients")
    gradients, expected = tensors_of(tmp_path / "ours"), gradients_of(model, tmp_path / "theirs")
    assert gradients.keys() == expected.keys()
    for name, want in expected.items():
        assert want.norm() > 0, f"{name}: the test shows nothing"
        assert (gradients[name] - want).norm() <= 1e-3 * want.norm(), name


def test_exported_again_everything_is_bit_identical(original, imported, distributed, tmp_path):
    format, _, hf = original
    folder, _ = imported
    distributed(1, export, format, tmp_path, folder / "imported")
    before, after = tensors_of(hf), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    for name in ("config.json", "generation_config.json"):
        assert (hf / name).read_bytes() == (tmp_path / name).read_bytes()


def mtp_reference(format, model, tensors, row: PackedBatch) -> torch.Tensor:
    """Mean loss of the multi-token-prediction layer, which transformers leaves out, put together from its parts."""
    modeling = sys.modules[type(model).__module__]
    decoder_layer, norm = (getattr(modeling, type(m).__name__) for m in (model.model.layers[1], model.model.norm))
    config = model.config
    layer = decoder_layer(config, layer_idx=1)
    own = {n.removeprefix("mtp.layers.0."): t for n, t in tensors.items() if n.startswith("mtp.layers.0.")}
    for i in range(getattr(config, "num_experts", 0)):
        gate, up, down = (own.pop(f"mlp.experts.{i}.{name}_proj.weight") for name in ("gate", "up", "down"))
        own.setdefault("mlp.experts.gate_up_proj", []).append(torch.cat([gate, up]))
        own.setdefault("mlp.experts.down_proj", []).append(down)
    layer.load_state_dict({n: torch.stack(t) if isinstance(t, list) else t for n, t in own.items()})
    norms = {}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        norms[name] = norm(config.hidden_size, eps=config.rms_norm_eps)
        norms[name].load_state_dict({"weight": tensors[f"mtp.{name}.weight"]})
    loss = torch.zeros(())
    for start, length in zip(row.cu_seqlens.tolist(), SAMPLES, strict=False):
        if length == 1:
            continue  # it has no token after the next
        mine, following = slice(start, start + length - 1), slice(start + 1, start + length)
        ids = row.position_ids[:, None, mine]
        hidden = model.model(row.tokens[mine][None], position_ids=ids).last_hidden_state
        embedded = norms["pre_fc_norm_embedding"](model.model.embed_tokens(row.tokens[following][None]))
        joined = torch.cat([embedded, norms["pre_fc_norm_hidden"](hidden)], dim=-1) @ tensors["mtp.fc.weight"].T
        out = layer(joined, position_embeddings=model.model.rotary_emb(joined, ids), attention_mask=None)
        logits = model.lm_head(norms["norm"](out))[0]
        labels = row.labels[following]
        loss = loss + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return loss / row.num_loss_tokens


def test_multi_token_prediction_is_made_of_the_reference_s_parts(original, distributed, tmp_path):
    format, model, hf = original
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    tensors = with_mtp(tensors_of(hf))
    rewrite(folder, tensors)
    row = packed_row(multimodal=True)
    with torch.no_grad():
        expected = mtp_reference(format, model, tensors, row)
    for metrics, _ in distributed(2, import_and_run, format, folder, tmp_path, ParallelConfig(pipeline=2), [row]):
        assert metrics["mtp_loss"] == pytest.approx(expected.item(), rel=1e-5)
