"""Whole random models of transformers, imported, compute on conversations of all media what they compute there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from omni_train.data.rows.batch import IGNORE
from omni_train.recipe.schema import ParallelConfig, Positions
from tests.support.conversations import Conversation, following, packed, qwen3_5, qwen3_omni
from tests.support.hugging_face import tensors_of
from tests.support.imported import export, gradients_of, import_and_run

ROW_TOKENS = 224
LAYOUTS = {
    "1": (1, dict()),
    "TP2-EP2-PP2": (4, dict(tensor=2, expert=2, pipeline=2)),  # without EP2 for the dense model
}


def qwen3_omni_row() -> list[Conversation]:
    """Sound, an image and a silent video; an image, sound, and a video with sound; text."""
    style = Positions.qwen3_omni
    return [
        Conversation(style, 1).text(7).sound(437).text(3).image(4, 6).text(4).video((2, 6, 4), 0.7).text(6),
        Conversation(style, 2).text(2).image(4, 4).text(5).sound(100).text(1).video((3, 4, 4), 0.5, 191).text(9),
        Conversation(style, 3).text(13).image(2, 2),
    ]


def qwen3_5_row() -> list[Conversation]:
    """An image and a video with timestamps, two images, text."""
    style = Positions.contiguous
    return [
        Conversation(style, 4).text(7).image(4, 10).text(3).timed_video((3, 6, 4)).text(6),
        Conversation(style, 5).image(2, 6).image(6, 6).text(19),
        Conversation(style, 6).text(13).timed_video((1, 2, 2)),
    ]


MODELS = {
    "qwen3_omni_moe": (qwen3_omni, qwen3_omni_row),
    "qwen3_5_moe": (lambda: qwen3_5("qwen3_5_moe"), qwen3_5_row),
    "qwen3_5": (lambda: qwen3_5("qwen3_5"), qwen3_5_row),
}


@pytest.fixture(scope="module", params=MODELS)
def original(request, tmp_path_factory):
    """The format, the model, its folder in several files, and the conversations of a row."""
    build, conversations = MODELS[request.param]
    model, folder = build(), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return request.param, model, folder, conversations()


@pytest.fixture(scope="module", params=LAYOUTS)
def imported(request, original, distributed, tmp_path_factory):
    """The folder of what `import_and_run` wrote in a layout, with what it returned."""
    format, _, hf, conversations = original
    world_size, ways = LAYOUTS[request.param]
    parallel = ParallelConfig(**ways)
    if format == "qwen3_5":
        parallel.expert = 1
    folder, row = tmp_path_factory.mktemp("imported"), packed(conversations, ROW_TOKENS)
    return folder, distributed(world_size, import_and_run, format, hf, folder, parallel, [row])


def test_logits_are_the_reference_s_of_each_conversation_alone(original, imported):
    _, model, _, conversations = original
    _, results = imported
    (logits,) = next(logits for _, logits in results if logits is not None)
    with torch.no_grad():
        expected = torch.cat([conversation.reference(model) for conversation in conversations])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_reference_s_in_encoders_too(original, imported, distributed, tmp_path):
    format, model, _, conversations = original
    folder, results = imported
    model.zero_grad()
    labels = [following(conversation.tokens_and_ids()[0]) for conversation in conversations]
    logits = torch.cat([conversation.reference(model) for conversation in conversations])
    loss = F.cross_entropy(logits, torch.cat(labels), ignore_index=IGNORE)
    loss.backward()
    for metrics, _ in results:
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    distributed(1, export, format, tmp_path / "ours", folder / "gradients")
    gradients, expected = tensors_of(tmp_path / "ours"), gradients_of(model, tmp_path / "theirs")
    assert gradients.keys() == {name for name in expected if not name.startswith(("talker.", "code2wav."))}
    for name in gradients:
        want = expected[name]
        if name.endswith("k_proj.bias"):  # it moves all scores of a query alike
            assert gradients[name].norm() < 1e-6 > want.norm()
            continue
        assert want.norm() > 0, f"{name}: the test shows nothing"
        assert (gradients[name] - want).norm() <= 1e-3 * want.norm(), name


def test_exported_again_everything_is_bit_identical(original, imported, distributed, tmp_path):
    format, _, hf, _ = original
    folder, _ = imported
    distributed(1, export, format, tmp_path, folder / "imported")
    before, after = tensors_of(hf), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert any(name.startswith("code2wav.") for name in before) == (format == "qwen3_omni_moe")
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    for name in ("config.json", "generation_config.json"):
        assert (hf / name).read_bytes() == (tmp_path / name).read_bytes()
