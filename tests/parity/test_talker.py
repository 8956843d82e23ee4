"""A random Qwen3-Omni with its Talker, imported, speaks step by step what transformers' `generate` speaks."""

from __future__ import annotations

import pytest
import torch

from omni_train.recipe.schema import ParallelConfig, Positions
from tests.support.conversations import Conversation, qwen3_omni
from tests.support.spoken_answers import import_and_speak, speak, speech_row

ROW_TOKENS, SPEECH_ROW_TOKENS = 320, 416
LAYOUTS = {
    "1": (1, ParallelConfig()),
    "TP2-EP2-PP2": (4, ParallelConfig(tensor=2, expert=2, pipeline=2)),
}
ANSWERS = [(7, 40), (11, 11), (1, 3), (5, 13)]  # tokens and frames


def conversations() -> list[Conversation]:
    """Several turns with sound, images and a silent video; a video with sound; sound alone; text alone."""
    several, video, sound, text = (Conversation(Positions.qwen3_omni, seed) for seed in range(4))
    several.turn("system").text(5)
    several.turn("user").text(4).sound(137).text(3).image(4, 6).text(4).video((2, 6, 4), 0.7).text(6)
    several.turn("assistant").text(9)
    several.turn("user").image(6, 2).text(8).turn("assistant")
    video.turn("user").text(2).image(4, 4).text(5).sound(100).text(1).video((3, 4, 4), 0.5, 191).text(3)
    sound.turn("user").sound(61).turn("assistant").text(3).turn("user").text(2).sound(203)
    text.turn("user").text(17)
    return [several, *(one.turn("assistant") for one in (video, sound, text))]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The model, its folder, the conversations and what it answers."""
    model, folder, chats = qwen3_omni(), tmp_path_factory.mktemp("omni"), conversations()
    model.save_pretrained(folder)
    answers = [
        speak(model, chat, *answer, seed) for seed, (chat, answer) in enumerate(zip(chats, ANSWERS, strict=True))
    ]
    return model, folder, chats, answers


@pytest.fixture(scope="module", params=LAYOUTS)
def spoken(request, original, distributed, tmp_path_factory):
    """What every rank of a layout found."""
    model, hf, chats, answers = original
    world_size, parallel = LAYOUTS[request.param]
    row = speech_row(model, chats, answers, ROW_TOKENS, SPEECH_ROW_TOKENS)
    return distributed(world_size, import_and_speak, hf, tmp_path_factory.mktemp("imported"), parallel, row)


def real(original, of_row: torch.Tensor) -> list[torch.Tensor]:
    """Parts of a row of the Talker's, without padding."""
    begins, parts = 0, []
    for answer in original[-1]:
        parts.append(of_row[begins : begins + len(answer.embeddings)])
        begins += -(-len(answer.embeddings) // 8) * 8
    return parts


def test_rotary_ids_are_the_reference_s(original):
    model, _, chats, answers = original
    row = speech_row(model, chats, answers, ROW_TOKENS, SPEECH_ROW_TOKENS)
    for ours, answer in zip(real(original, row.speech_positions.T), answers, strict=True):
        torch.testing.assert_close(ours.T, answer.positions, rtol=0, atol=0)
    assert any(answer.positions.frac().any() for answer in answers), "the ids of a video are whole"


def test_what_enters_is_the_reference_s(original, spoken):
    entered = [found["embeddings"] for found in spoken if found["embeddings"] is not None]
    assert entered
    for embeddings in entered:
        for ours, answer in zip(real(original, embeddings), original[-1], strict=True):
            torch.testing.assert_close(ours, answer.embeddings, rtol=1e-4, atol=1e-4)


def test_logits_of_every_step_are_the_reference_s(original, spoken):
    for found in spoken:
        for ours, answer in zip(real(original, found["logits"]), original[-1], strict=True):
            torch.testing.assert_close(ours, answer.logits, rtol=1e-4, atol=1e-4)


def test_every_head_of_the_code_predictor_gives_the_reference_s_logits(original, spoken):
    expected = torch.cat([answer.residual_logits for answer in original[-1]])
    assert expected.abs().amax((0, 2)).min() > 0.1, "a head says nothing"
    for found in spoken:
        torch.testing.assert_close(found["residual"], expected, rtol=1e-4, atol=1e-4)


def test_the_states_are_of_the_layer_before_deepstack_and_norm(original, spoken):
    model, _, chats, _ = original
    layer, text, added = model.config.talker_config.accept_hidden_layer, model.thinker.model.language_model, []
    hook = text.layers[layer].register_forward_pre_hook(lambda _module, arguments: added.append(arguments[0][0]))
    with torch.no_grad():
        outputs = [
            model.thinker(**chat.inputs(), use_audio_in_video=chat.sound_in_video, output_hidden_states=True)
            for chat in chats
        ]
        before, expected, after = (
            torch.cat([out.hidden_states[index][0] for out in outputs]) for index in range(layer - 1, layer + 2)
        )
        others = {"before": before, "after": after, "normed": text.norm(expected), "with DeepStack": torch.cat(added)}
    hook.remove()
    for found in spoken:
        torch.testing.assert_close(found["states"], expected, rtol=1e-4, atol=1e-4)
        for name, other in others.items():
            assert (found["states"] - other).abs().max() > 0.1, f"{name}: the test could not tell it apart"
