"""Answers of a whole Qwen3-Omni, written and spoken: by transformers' `generate`, and by ours of the same folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import batched
from pathlib import Path

import numpy as np
import torch

from omni_train.recipe.schema import ParallelConfig, TalkerTrainingConfig
from tests.support.conversations import IM_END
from tests.support.spoken_answers import SPEAKER, Spoken, Words, sequence_of
from tests.support.talker import small_talker


def answer_of_reference(model, conversation, tokens: int, frames: int, penalty: float) -> tuple[list[int], np.ndarray]:
    """Tokens and waveform of an answer of so many tokens, whose speech has at most so many frames."""
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
        talker_max_new_tokens=frames + 1,  # of the last its residual codes are not drawn
        talker_do_sample=False,
        talker_repetition_penalty=penalty,
        talker_suppress_tokens=sorted({*range(talker.text_config.vocab_size)} - drawn),  # all of so small a vocabulary
    )
    return sequences[0, conversation.length : -1].tolist(), waveform.flatten().numpy()


def answering(hf: Path, folder: Path, parallel: ParallelConfig) -> Callable:
    """Import a folder; gives ``answer(conversation, tokens, frames, penalty)``, whose result is an answer that begins
    when it is iterated over, and what it writes. Collective; process groups are made.
    """
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
    planner = Planner(recipe.model.talker, Words())

    def unspoken(text) -> Spoken:
        none = torch.zeros(0)
        return Spoken([*text], np.zeros((recipe.model.talker.num_code_groups, 0), np.int64), none, none, none, none)

    def answer(chat, tokens: int, frames: int, penalty: float) -> tuple[SpokenAnswer, TextStream]:
        stream = TextStream(
            writer,
            [sequence_of(chat, unspoken([0]), planner).thinker],
            max_new_tokens=tokens,
            stop_tokens=[IM_END],
            sampling=Sampling(),
            uniform=[np.zeros(tokens)],
            states_after=recipe.model.talker.accept_hidden_layer,
        )

        def begin(text):
            """The stream before an answer that begins with this token."""
            before = sequence_of(chat, unspoken(text[:1]), planner)
            return Speaker(
                model,
                Words(),
                [Prompt(before.plan, before.rotary_ids, stream.states[0][before.positions], list(text), ended=False)],
                sampling=replace(GREEDY, repetition_penalty=penalty),
                limits=SpeechLimits(max_frames=frames, spare=frames, repeats=frames),
            )

        text = batched((new[0] for new in stream), 1)
        return SpokenAnswer(text, begin, WaveStream(code2wav, 7), 24000), stream

    return answer
