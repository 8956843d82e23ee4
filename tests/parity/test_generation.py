"""A random Qwen3-Omni that is imported writes, speaks and sounds greedily as transformers' `generate` has it."""

from __future__ import annotations

from dataclasses import replace
from itertools import batched
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_train.recipe.schema import ParallelConfig, Positions, TalkerTrainingConfig
from tests.parity.test_talker import conversations
from tests.support.conversations import IM_END, ROLES, qwen3_omni
from tests.support.spoken import SPEAKER, Spoken, Words, sequence_of
from tests.support.talker import small_talker

FRAMES = 60
TOKENS = [11, 4, 1, 23]
PENALTIES = [1.0, 1.05, 1.0, 1.3]


def spoken_by(model, conversation, tokens: int, penalty: float) -> tuple[list[int], np.ndarray]:
    """Tokens and waveform of an answer that ends after so many tokens, or not before its frames are too many."""
    import transformers

    class EndAfter(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == conversation.length + tokens:
                scores = torch.full_like(scores, -torch.inf)
                scores[:, IM_END] = 0
            return scores

    talker = model.config.talker_config
    # Its get_rope_index asks for this, where there is sound beside images or video, and no released folder has it.
    model.talker.config.audio_config = model.config.thinker_config.audio_config
    drawn = {talker.codec_eos_token_id, *range(talker.code_predictor_config.vocab_size)}
    sequences, waveform = model.generate(
        **conversation.inputs(),
        speaker=SPEAKER,
        use_audio_in_video=conversation.sound_in_video,
        talker_use_audio_in_video=conversation.sound_in_video,
        thinker_max_new_tokens=tokens + 1,
        thinker_eos_token_id=IM_END,
        thinker_do_sample=False,
        thinker_logits_processor=transformers.LogitsProcessorList([EndAfter()]),
        talker_max_new_tokens=FRAMES + 1,  # of the last its residual codes are not drawn
        talker_do_sample=False,
        talker_repetition_penalty=penalty,
        talker_suppress_tokens=sorted({*range(talker.text_config.vocab_size)} - drawn),  # all of so small a vocabulary
    )
    return sequences[0, conversation.length : -1].tolist(), waveform.flatten().numpy()


def answers(rank, world_size, hf, folder, parallel, chats):
    """Import; tokens, codes and waveform of each answer."""
    from omni_train import platform
    from omni_train.checkpoint.sharded import read_model_config
    from omni_train.checkpoint.store import resolve
    from omni_train.data.rows.speech_plans import Planner
    from omni_train.frozen.codec import open_code2wav
    from omni_train.frozen.thinker import open_whole_thinker
    from omni_train.generation.opening import check_table, open_talker
    from omni_train.interop.convert import import_checkpoint
    from omni_train.rollout.conversation import SpokenAnswer
    from omni_train.rollout.generate import TextStream
    from omni_train.rollout.sampling import Sampling
    from omni_train.rollout.speech import GREEDY, Prompt, Speaker, SpeechLimits
    from omni_train.rollout.waveform import WaveStream

    paths = {name: folder / name for name in ("thinker", "talker", "code2wav")}
    import_checkpoint("qwen3_omni_moe", Path(hf), paths["thinker"], parallel=parallel, talker=paths["talker"])
    import_checkpoint("qwen3_omni_code2wav", Path(hf), paths["code2wav"])
    torch.distributed.barrier()
    recipe = small_talker(parallel)
    thinker, talker = (read_model_config(resolve(paths[name])) for name in ("thinker", "talker"))
    code2wav, _ = open_code2wav(str(paths["code2wav"]))
    recipe.model = replace(talker, audio=thinker.audio, vision=thinker.vision, code2wav=code2wav.config)
    recipe.talker_training = TalkerTrainingConfig(thinker=str(paths["thinker"]))
    platform.parallel.initialize(parallel, 1)
    writer = open_whole_thinker(str(paths["thinker"]), recipe)
    model = open_talker(resolve(paths["talker"]), recipe)
    check_table(recipe, model, writer, "")
    planner, found = Planner(recipe.model.talker, Words()), []

    for chat, tokens, penalty in zip(chats, TOKENS, PENALTIES, strict=True):
        asked = sequence_of(chat, unspoken([0]), planner)
        stream = TextStream(
            writer,
            [asked.thinker],
            max_new_tokens=tokens,
            stop_tokens=[IM_END],
            sampling=Sampling(),
            uniform=[np.zeros(tokens)],
            states_after=recipe.model.talker.accept_hidden_layer,
        )

        def begin(text, chat=chat, penalty=penalty, stream=stream):
            """The stream before an answer that begins with this token."""
            before = sequence_of(chat, unspoken(text[:1]), planner)
            return Speaker(
                model,
                Words(),
                [Prompt(before.plan, before.rotary_ids, stream.states[0][before.positions], list(text), ended=False)],
                sampling=replace(GREEDY, repetition_penalty=penalty),
                limits=SpeechLimits(max_frames=FRAMES, spare=FRAMES, repeats=FRAMES),
            )

        text = batched((new[0] for new in stream), 1)
        answer = SpokenAnswer(text, begin, WaveStream(code2wav, 7), 24000)
        waveforms = [event.waveform for event in answer if event.waveform is not None]
        codes = answer.speaker.speech[0].frames()
        found.append((stream.completions[0].tokens, codes, np.concatenate(waveforms)))
    platform.parallel.destroy()
    return found


def unspoken(text) -> Spoken:
    """An answer of which nothing is spoken yet."""
    none = torch.zeros(0)
    return Spoken([*text], np.zeros((5, 0), np.int64), none, none, none, none)


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
            text, waveform = spoken_by(model, chat, tokens, penalty)
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
