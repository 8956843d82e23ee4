"""A random Qwen3-Omni that is imported writes, speaks and sounds greedily as transformers' `generate` has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omni_train.recipe.schema import ParallelConfig, Positions
from tests.parity.test_talker import conversations
from tests.support.conversations import ROLES, qwen3_omni
from tests.support.omni_answers import answer_of_reference, answering

FRAMES = 60
TOKENS = [11, 4, 1, 23]
PENALTIES = [1.0, 1.05, 1.0, 1.3]


def answers(rank, world_size, hf, folder, parallel, chats):
    """Tokens, codes and waveform of each answer."""
    from omni_train import platform

    answer, found = answering(hf, folder, parallel), []
    for chat, tokens, penalty in zip(chats, TOKENS, PENALTIES, strict=True):
        spoken, written = answer(chat, tokens, FRAMES, penalty)
        waveforms = [event.waveform for event in spoken if event.waveform is not None]
        found.append((written.completions[0].tokens, spoken.speaker.speech[0].frames(), np.concatenate(waveforms)))
    platform.parallel.destroy()
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a model, conversations, and what it writes, speaks and sounds like."""
    model, folder, chats = qwen3_omni(), tmp_path_factory.mktemp("omni"), conversations()
    with torch.no_grad():
        model.thinker.lm_head.weight[ROLES["system"] :] = 0  # no mark is the likeliest word
        model.talker.codec_head.weight[model.config.talker_config.codec_eos_token_id] = 0
    model.save_pretrained(folder)
    codes: list[torch.Tensor] = []
    model.code2wav.register_forward_pre_hook(lambda _module, arguments: codes.append(arguments[0][0]))
    expected = []
    for chat, tokens, penalty in zip(chats, TOKENS, PENALTIES, strict=True):
        with torch.no_grad():
            text, waveform = answer_of_reference(model, chat, tokens, FRAMES, penalty)
        expected.append((text, codes.pop().numpy(), waveform))
    return folder, chats, expected


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_answer_is_that_of_the_reference(original, distributed, tmp_path, tensor):
    folder, chats, expected = original
    assert all(chat.style is Positions.qwen3_omni for chat in chats)
    for found in distributed(tensor, answers, folder, tmp_path, ParallelConfig(tensor=tensor), chats):
        for (text, codes, waveform), (their_text, their_codes, theirs), tokens in zip(
            found, expected, TOKENS, strict=True
        ):
            assert text == their_text and len(text) == tokens
            assert their_codes.shape == (5, FRAMES) and len({tuple(frame) for frame in their_codes.T}) > 5
            np.testing.assert_array_equal(codes, their_codes)
            assert theirs.std() > 1e-3
            np.testing.assert_allclose(waveform, theirs, rtol=0, atol=1e-4)
